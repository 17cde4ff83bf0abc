"""Commands that are recorded beside results."""

import shlex

import data_generation
from drllm.manifests import Manifest
from drllm.paper.result_files import search_command
from drllm.questions.response_format import ResponseFormat


def test_the_search_command_repeats_the_manifest_s_arguments():
    response_format = ResponseFormat({"arc_easy": 2, "dart-1": 20}, inject_boxed=True)
    arguments = {"dataset": ["arc_easy", "dart-1"], "samples": {"arc_easy": 5, "dart-1": 6}, "limit": None, "c": 1.5}
    manifest = Manifest(model="m", seed=3, arguments=arguments | response_format.as_dict())
    command = shlex.split(search_command(manifest))
    args = data_generation.parse_arguments(command[2:])
    assert (args.model, args.dataset, args.seed, args.c, args.limit) == ("m", "arc_easy,dart-1", 3, 1.5, None)
    assert (args.samples, args.max_new_tokens) == ("arc_easy=5,dart-1=6", "arc_easy=2,dart-1=20")
    assert (args.inject_boxed, args.strict_letters, args.chat_template) == (True, False, "off")
    assert search_command(Manifest()) is None
