"""Measurements that are run by hand: a package only so that the scripts can share random_base.py."""
