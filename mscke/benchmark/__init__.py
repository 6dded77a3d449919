"""FGVEdit and FGVEdit-Scenes: records, and the scenes and programs that Scenes are made of."""
