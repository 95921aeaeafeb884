"""Metrics of a worker, for vLLM's ``/metrics`` and for the seed service.

vLLM serves ``/metrics`` in its front end, and reads metrics of other processes only if it runs several API servers. So
a worker writes its values to files of ``prometheus_client``'s multiprocess mode, and the front end has a collector of
this package's that reads them. Nothing here raises: a metric never fails a start.
"""
