"""Starting the processes of one run: on this machine, on other hosts, or as a job file; and watching them.

The launcher holds no array and imports no JAX, so it stays small, may start processes safely, and survives what
kills them.
"""
