"""Random operations of many sequences on several models; everything is compared with stock."""
