"""The command line: text in, typed objects to `ingest` and `jaxtrain`, text or one JSON document out.

One thin file per command; what is heavy is imported inside the command, so that `terrashard --help` is quick.
Nobody imports this package.
"""
