"""This room runs a plan on a Dask cluster, shard by shard."""
