"""Choosing an endpoint. Synchronous: time and chance come as arguments, the same arguments give the same answer.

Read `router.rank` (one request), then `plan.choose` (one draw), then `scorer` (why it is weighted so), then `live` (what is known).
"""
