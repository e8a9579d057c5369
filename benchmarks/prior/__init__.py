"""Training data for a prior: invented worlds, and further questions to passages that exist; no model, no network."""
