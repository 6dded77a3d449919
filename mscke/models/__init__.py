"""Base models, the counterfactual model, and the encoders of pictures and texts."""
