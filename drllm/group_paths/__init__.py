"""Labels from groups of similar questions, a rival of the published labels.

A label of the search says which path happened to answer one question right, and mostly that is luck: on the next
question of its kind the same path is wrong. Here a path has to serve a whole group of similar questions, and the reward
is not only right or wrong:

1. Reward with a margin (`margin_rewards`): how far the gold answer is ahead of its best rival.
2. Effects: for each block of each training question, what skipping the block does to the reward.
3. Groups (`extensions.groups.grouping`): effects are smoothed over questions with similar states, each own left out,
   and questions with similar smoothed effects form a group.
4. One path per group (`paths.grow`): starting from the default path, a group skips the block whose loss costs the mean
   reward of its questions least, with all effects measured again after each skip. The price of a block, in reward,
   says how far to go.
5. The published training without class weights and gamma: routers learn the group paths by cross-entropy on hidden
   states that follow these paths (`router_training.imitate`).
6. One round on the routers' own decisions: effects are measured around them, and the expected reward under the
   routers' probabilities, less the price of the blocks, is maximised directly (`router_training.refine`).

Steps 2, 4 (once per skip) and 6 cost about L / 2 forward passes per training question each.

With `--reward likelihood` (`likelihood_paths`) the reward is the probability of the right option. The groups are the
question sets, edits may also be repeats, and successive halving spends the questions on the edits that may still win.
Routers may have a domain (`router_training.fit_domains`), outside of which the base model stays as it is: an edit that
helps one kind of question mostly hurts others.

`extensions.groups` changes less of the published method: its tree search, labels and training stay, and only the reward
of the search is shared by the questions of a group.
"""
