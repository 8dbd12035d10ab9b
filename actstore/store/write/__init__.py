"""Writing a store, from the protocol up.

protocol    which attempt may write a bucket: states, and who moves them
bucket      a bucket from its arrays; creating a store
rows        what append is given, checked and converted
append      rows in any portions from anywhere
extend      more rows, and array metadata that follows
finalise    commit records into the manifest
"""
