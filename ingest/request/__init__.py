"""What a user asks for: settings, query, region and products."""
