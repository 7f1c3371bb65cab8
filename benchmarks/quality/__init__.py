"""Sample quality against network evaluations."""
