"""The request of a user: settings, query, region and products."""
