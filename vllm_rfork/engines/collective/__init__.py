"""Two-sided transfers in a group of two: TCP on the CPU, NCCL on CUDA, HCCL on Ascend.

For pairs without a one-sided lane, such as two hosts without RDMA. The seed sends what a receiver requests over a
control connection (:mod:`.channel`, :mod:`.messages`). :mod:`.engine` is the adapter, :mod:`.sender` the seed's side,
:mod:`.receiver` the receiver's, :mod:`.group` the port of the groups, :mod:`.tcp`, :mod:`.nccl` and :mod:`.hccl`
implement it.
"""
