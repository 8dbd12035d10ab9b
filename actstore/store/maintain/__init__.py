"""Looking after a store that exists.

verify, repair    find damage; replace what is damaged
gc                free what dead attempts left
copy, move        to another place, codec or encoding
info              what it holds
"""
