"""What the paper track is made of, brought here and held to a lock: FGVEdit, its COCO images, the models."""
