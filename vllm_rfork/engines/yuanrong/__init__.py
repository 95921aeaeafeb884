"""YuanRong TransferEngine, for Ascend NPUs."""
