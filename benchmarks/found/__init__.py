"""Defects of other software that `ds.verify` found, each as a script that shows it."""
