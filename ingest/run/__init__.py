"""This folder runs a plan shard by shard, in threads of this process or on a Dask cluster."""
