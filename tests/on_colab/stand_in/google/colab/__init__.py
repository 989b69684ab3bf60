"""Stands in for Colab's own module: that it can be found is how the notebooks notice where they run."""
