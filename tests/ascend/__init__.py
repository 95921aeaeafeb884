"""What is known about Ascend without an NPU: a stand-in for ``torch_npu``, and facts read in published releases."""
