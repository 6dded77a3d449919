"""Training that can be interrupted: the loop, its checkpoints, the scope classifier and the counterfactual model."""
