"""The command line: text in, typed objects to `ingest` and `jaxtrain`, text or one JSON document out.

There is one thin file per command. Heavy imports are inside the command, so that `terrashard --help` is quick.
Nobody imports this package.
"""
