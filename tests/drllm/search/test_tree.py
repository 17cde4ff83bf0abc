"""The tree search on toy rewards: constraints, branching, planted fixes, independence of other searches."""

import random
import subprocess
import sys

import pytest

from drllm.search.tree import POLICIES, Node, PathSearch, SearchSettings, question_seed
from train_models.paths import default_path, is_allowed

RIGHT, WRONG = 1.0, 0.0


def run(search: PathSearch, reward_of) -> PathSearch:
    while search.request is not None:
        search.tell(reward_of(search.request))
    return search


def nodes(node: Node) -> list[Node]:
    return [node] + [deeper for child in node.children for deeper in nodes(child)]


def noisy(seed: int, share_right: float):
    """A reward that is a fixed random function of the path."""
    return lambda path: float(random.Random(f"{seed}{path}").random() < share_right)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("num_blocks", "budget"), [(3, 1.0), (6, 1.1), (12, 2.0), (28, 1.05)])
def test_whole_paths_stay_within_the_constraints(policy, num_blocks, budget):
    for seed in range(8):
        settings = SearchSettings(num_simulations=300, budget=budget, policy=policy)
        # Half of the paths right: no search ends early, since the default path is right.
        reward_of = noisy(seed, 0.5)
        search = PathSearch(num_blocks, settings, seed)
        run(search, lambda path, reward_of=reward_of: 1.0 if path == default_path(len(path)) else reward_of(path))
        assert search.simulations == 300
        for path in search.rewards:
            # Written out again rather than asked of `is_allowed`, which the search itself uses.
            assert len(path) == num_blocks
            assert set(path) <= {0, 1, 2}
            assert "000" not in "".join(map(str, path))
            assert 0 < sum(path) <= budget * num_blocks


def test_small_spaces_are_searched_whole_and_no_path_is_asked_for_twice():
    def is_valid(path):
        return "000" not in "".join(map(str, path)) and sum(path) > 0

    every = [(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)]
    every = [path for path in every if is_valid(path)]
    assert all(is_allowed(path) for path in every)
    for policy in ("full", "widening"):
        asked = []
        search = PathSearch(4, SearchSettings(num_simulations=1500, policy=policy), seed=1)
        while search.request is not None:
            asked.append(search.request)
            search.tell(RIGHT)
        assert sorted(asked) == sorted(every), policy
        result = search.result()
        assert (result.simulations, result.inferences) == (1500, len(every))
        assert sum(result.best_path) == 1  # e.g. (0, 1, 0, 0) leaves one block


@pytest.mark.parametrize("policy", ["full", "widening"])
def test_the_tree_branches(policy):
    search = run(PathSearch(10, SearchSettings(num_simulations=200, policy=policy), 3), lambda path: RIGHT)
    tree = nodes(search.root)
    assert sum(len(node.children) > 1 for node in tree) >= 5
    assert len(search.root.children) > 5
    paths = [node.path for node in tree]
    assert len(set(paths)) == len(paths)


def test_the_published_policy_grows_a_chain():
    search = run(PathSearch(10, SearchSettings(num_simulations=8, policy="chain"), 3), lambda path: RIGHT)
    assert all(len(node.children) <= 1 for node in nodes(search.root))


def test_widening_has_breadth_and_depth_where_the_extremes_have_one_of_them():
    def shape(policy):
        settings = SearchSettings(num_simulations=50, policy=policy)
        search = run(PathSearch(28, settings, 5), lambda path: RIGHT)
        depth = max(sum(visits != 1 for visits in path) for path in search.rewards)
        return len(search.root.children), depth

    assert shape("full") == (50, 1)
    breadth, depth = shape("widening")
    assert breadth >= 5
    assert depth >= 3


@pytest.mark.parametrize("policy", ["full", "widening"])
def test_finds_a_planted_fix_and_stops_there(policy):
    # Wrong unless block 7 is skipped and block 2 is not.
    found = 0
    for seed in range(20):
        search = PathSearch(10, SearchSettings(num_simulations=120, policy=policy), seed)
        run(search, lambda path: float(path[7] == 0 and path[2] != 0))
        result = search.result()
        assert not result.base_correct
        if result.best_path is not None:
            found += 1
            assert result.best_path[7] == 0
            assert result.kind == "wrong_to_right"
            assert list(search.rewards.values()).count(RIGHT) == 1  # it ended with the first right path
            assert result.inferences <= result.simulations + 1
    assert found >= 19


def test_finds_a_fix_of_two_edits():
    found = 0
    for seed in range(20):
        settings = SearchSettings(num_simulations=200)
        search = run(PathSearch(6, settings, seed), lambda path: float(path[4] == 2 and path[1] == 0))
        found += search.result().best_path is not None
    assert found >= 15


@pytest.mark.parametrize("policy", POLICIES)
def test_keeps_the_shortest_right_path(policy):
    right = {(1, 1, 1, 1, 1, 1), (1, 0, 1, 1, 1, 1), (1, 0, 1, 0, 1, 1), (1, 2, 1, 1, 1, 1)}
    for seed in range(5):
        search = PathSearch(6, SearchSettings(num_simulations=400, policy=policy), seed)
        result = run(search, lambda path: float(path in right)).result()
        assert result.base_correct
        lengths = [sum(path) for path in result.good_paths]
        assert lengths == sorted(lengths)
        assert sum(result.best_path) == min([6, *lengths])
        if policy != "chain":
            assert result.best_path == (1, 0, 1, 0, 1, 1)
            assert set(result.good_paths) == right - {(1,) * 6}


def test_the_stop_of_section_4_2_ends_a_right_answer_with_the_first_shorter_right_path():
    # As long as the default path, shorter, and shorter still.
    right = {(1,) * 6, (0, 2, 1, 1, 1, 1), (1, 0, 1, 1, 1, 1), (1, 0, 1, 0, 1, 1)}
    for seed in range(5):
        settings = SearchSettings(num_simulations=400, stop_at="any_gain")
        search = run(PathSearch(6, settings, seed), lambda path: float(path in right))
        shorter = [path for path, reward in search.rewards.items() if reward == RIGHT and sum(path) < 6]
        assert shorter == [search.result().best_path] == [list(search.rewards)[-1]]
        assert search.simulations < 400
        # A wrong answer ends as ever.
        search = run(PathSearch(6, settings, seed), lambda path: float(path[2] == 2))
        assert list(search.rewards.values()).count(RIGHT) == 1


def test_a_right_answer_without_a_shorter_right_path_keeps_the_default():
    # A skip and a repeat: as long as the default path, and no better than it.
    right = {(1, 1, 1, 1), (0, 2, 1, 1), (2, 1, 1, 1)}
    search = PathSearch(4, SearchSettings(num_simulations=500), 0)
    result = run(search, lambda path: float(path in right)).result()
    assert result.best_path == (1, 1, 1, 1)
    assert result.kind is None
    assert result.good_paths == ((0, 2, 1, 1), (2, 1, 1, 1))


def test_of_two_equally_short_right_paths_the_one_with_fewer_edits_is_kept():
    search = PathSearch(5, SearchSettings(), 0)
    search.tell(RIGHT)
    search.rewards |= {(0, 2, 0, 1, 1): RIGHT, (1, 1, 1, 0, 1): RIGHT, (0, 1, 1, 1, 1): RIGHT}
    assert search.result().good_paths == ((1, 1, 1, 0, 1), (0, 1, 1, 1, 1), (0, 2, 0, 1, 1))
    assert search.result().best_path == (1, 1, 1, 0, 1)


def test_a_wrong_answer_without_a_fix_has_no_path():
    result = run(PathSearch(5, SearchSettings(), 0), lambda path: WRONG).result()
    assert (result.base_correct, result.best_path, result.kind) == (False, None, None)
    assert result.simulations == 50


def test_partial_rewards_guide_but_are_not_right():
    result = run(PathSearch(5, SearchSettings(), 0), lambda path: 0.9).result()
    assert not result.base_correct
    assert result.best_path is None


def test_ucb_prefers_the_shorter_of_two_equal_children_and_the_less_visited():
    search = PathSearch(10, SearchSettings(random_child=0.0), 0)
    root = search.root
    root.visits = 8
    short = Node((0,) + (1,) * 9, root, visits=4, total_reward=2.0)
    long = Node((2,) + (1,) * 9, root, visits=4, total_reward=2.0)
    root.children = [long, short]
    assert search._select(root) is short
    # 3.0 * 2/10 = 0.6 of length outweighs 0.5 of value, and gives way to a child seen once.
    long.total_reward = 4.0
    assert search._select(root) is short
    long.visits, long.total_reward = 1, 1.0
    assert search._select(root) is long
    # By hand: Q/v + c sqrt(ln V / v) - lambda |path| / L
    assert search._ucb(short, root) == pytest.approx(0.5 + 1.8 * (2.0794415 / 4) ** 0.5 - 3.0 * 0.9)


def test_rewards_reach_the_root_without_the_length_penalty():
    search = run(PathSearch(8, SearchSettings(num_simulations=60), 0), noisy(1, 0.5))
    for node in nodes(search.root):
        assert node.visits == 1 + sum(child.visits for child in node.children) or not node.children
    assert search.root.visits == search.simulations + 1
    assert search.root.total_reward <= search.root.visits


def test_random_children_come_with_their_probability():
    search = PathSearch(10, SearchSettings(random_child=0.1), 7)
    best, other = Node((0,) + (1,) * 9, visits=5, total_reward=5.0), Node((2,) + (1,) * 9, visits=5)
    search.root.visits, search.root.children = 11, [best, other]
    share = sum(search._select(search.root) is other for _ in range(4000)) / 4000
    assert share == pytest.approx(0.05, abs=0.015)  # half of the random picks hit the best child


@pytest.mark.parametrize("policy", POLICIES)
def test_same_seed_same_search_whatever_runs_beside_it(policy):
    settings = SearchSettings(policy=policy)
    rewards = {name: noisy(name, 0.4) for name in range(12)}

    def searches(names):
        return {name: PathSearch(9, settings, question_seed(0, f"q{name}")) for name in names}

    alone = {name: run(search, rewards[name]) for name, search in searches(range(12)).items()}
    together = searches(reversed(range(12)))
    order = random.Random(0)
    while waiting := [name for name, search in together.items() if search.request is not None]:
        name = order.choice(waiting)
        together[name].tell(rewards[name](together[name].request))
    for name in range(12):
        assert list(alone[name].rewards.items()) == list(together[name].rewards.items())
        assert alone[name].result() == together[name].result()
    other = run(PathSearch(9, settings, question_seed(1, "q0")), rewards[0])
    assert list(other.rewards) != list(alone[0].rewards)


def test_question_seeds_are_stable():
    assert question_seed(0, "a") == 11381658363930578919
    assert len({question_seed(seed, name) for seed in range(10) for name in "abc"}) == 30


def test_misuse_is_refused():
    for policy in ("beam", "guided", "greedy"):
        with pytest.raises(ValueError, match=rf"unknown policy '{policy}'.*widening"):
            SearchSettings(policy=policy)
    for name in ("budget", "exploration", "length_penalty", "random_child"):
        with pytest.raises(ValueError, match=f"{name} is nan"):
            SearchSettings(**{name: float("nan")})
    with pytest.raises(ValueError, match=r"budget is 0\.9"):
        SearchSettings(budget=0.9)
    with pytest.raises(ValueError, match="num_simulations is -1"):
        SearchSettings(num_simulations=-1)
    search = PathSearch(4, SearchSettings(num_simulations=0), 0)
    with pytest.raises(RuntimeError, match="no result"):
        search.result()
    for reward in (2, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"the reward is {reward}; it must be between 0 and 1"):
            search.tell(reward)
    search.tell(RIGHT)
    assert search.result().best_path == (1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="has ended"):
        search.tell(RIGHT)


def test_the_search_needs_no_torch():
    code = "import sys, drllm.search; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_shared_reward_does_not_end_the_search():
    settings = SearchSettings(num_simulations=60, stop_at="never")
    search = run(PathSearch(6, settings, 0), lambda path: float(path[2] == 0))
    assert search.simulations == 60
    assert sum(reward == RIGHT for reward in search.rewards.values()) > 1


def test_ranked_paths_are_worth_their_reward_less_the_price_of_their_blocks():
    search = PathSearch(3, SearchSettings(), 0)
    search.tell(0.9)
    search.rewards |= {(2, 1, 1): 0.55, (0, 1, 1): 0.5, (1, 0, 1): 0.5, (0, 0, 1): 0.3}
    assert search.ranked(price=0.0) == [(2, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 1)]
    assert search.ranked(price=0.1) == [(0, 1, 1), (1, 0, 1), (0, 0, 1), (2, 1, 1)]
