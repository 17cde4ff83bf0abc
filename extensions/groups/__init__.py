"""Labels by the published search with a reward that similar questions share: questions -> label folder.

`grouping` finds questions that look alike to the routers, `shared_search` searches one path per group, and `search` is
the program.
"""
