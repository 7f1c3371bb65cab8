"""How far an artefact is from the float32 reference, and how fast it is."""
