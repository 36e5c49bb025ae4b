"""Tasks that need no labels: clusters, principal components, anomalies and change, streamed over cubes and stores."""
