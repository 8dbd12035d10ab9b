"""Looking after a store that exists.

shards            the shards of a bucket, as its record describes them
verify, repair    find damage; replace what is damaged
gc                free what dead attempts left
copy, move        to another place, codec or encoding
info              what it holds
"""
