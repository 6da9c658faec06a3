"""config.json of a family -> what its decoder computes, and under which names its weights lie."""
