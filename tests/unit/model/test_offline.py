"""The offline model finds its place in a scenario from the conversation, and speaks Anthropic's protocol."""

import json
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter, ValidationError

from claude_hitl_template.model.offline import (
    HELD_MARKER,
    LABEL,
    Reply,
    Scenarios,
    Text,
    Thinking,
    ToolUse,
    count_tokens,
    message,
    respond,
    sse,
)
from claude_hitl_template.model.scenario import Scenario

SCENARIOS = Scenarios.load()
REMINDER = {"type": "text", "text": "<system-reminder>\nAs you were: write hello.txt\n</system-reminder>\n"}
ENVIRONMENT = {"role": "system", "content": "# Environment\nWrite hello.txt here."}
HELD = f"PreToolUse:Bash hook error: {HELD_MARKER}; issue this call again afterwards"
TWO_STEPS = "```scenario\n- {text: one, tools: [{name: Bash, input: {command: a}}]}\n- {text: two}\n```"
TWO_CALLS = """```scenario
- text: both
  tools: [{name: Bash, input: {command: a}}, {name: Bash, input: {command: b}}]
- {text: "ran: {tool_result}", when: ok}
- {text: "refused: {tool_result}", when: denied}
```"""


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [REMINDER, {"type": "text", "text": text}]}


def answered(reply: Reply) -> dict[str, Any]:
    return {"role": "assistant", "content": message(reply, "m")["content"]}


def results(reply: Reply, *outcomes: str | None, after: str = "") -> dict[str, Any]:
    """Returns results for the reply's calls; an outcome that starts with "!" is an error."""
    calls = [block for block in reply.blocks if isinstance(block, ToolUse)]
    blocks: list[dict[str, Any]] = [
        {
            "type": "tool_result",
            "tool_use_id": call.id,
            "content": [{"type": "text", "text": outcome.removeprefix("!")}, REMINDER],
            "is_error": outcome.startswith("!"),
        }
        for call, outcome in zip(calls, outcomes, strict=True)
        if outcome is not None
    ]
    # The CLI lists a held call before the one that parked the session, whatever their order was.
    return {
        "role": "user",
        "content": [*reversed(blocks), *([{"type": "text", "text": after}] if after else [])],
    }


def ask(*messages: dict[str, Any], **more: Any) -> Reply:
    body = {"model": "m", "messages": [*messages], "tools": [{"name": "Bash"}], **more}
    return respond(body, SCENARIOS)


def text_of(reply: Reply) -> str:
    return "".join(block.text for block in reply.blocks if isinstance(block, Text))


def calls_of(reply: Reply) -> list[tuple[str, dict[str, Any]]]:
    return [(block.name, block.input) for block in reply.blocks if isinstance(block, ToolUse)]


def ids_of(reply: Reply) -> set[str]:
    return {block.id for block in reply.blocks if isinstance(block, ToolUse)}


# The scenarios that are shipped


@pytest.mark.parametrize("scenario", SCENARIOS.known, ids=lambda scenario: scenario.name)
def test_the_example_prompt_of_a_scenario_starts_that_scenario_and_says_that_it_is_a_script(
    scenario: Scenario,
):
    reply = ask(said(scenario.prompt))

    assert SCENARIOS.steps_for(scenario.prompt) == scenario.steps
    assert text_of(reply).startswith(LABEL)
    assert reply.stop_reason == "tool_use"


def test_the_prompt_of_the_demo_writes_a_file_and_reports_success_or_refusal():
    prompt = said("Write hello.txt with a greeting")
    first = ask(prompt, ENVIRONMENT)
    [(tool, given)] = calls_of(first)
    assert (tool, given["file_path"]) == ("Write", "hello.txt")

    done = ask(prompt, ENVIRONMENT, answered(first), results(first, "File created"))
    assert "File created" in text_of(done)
    assert done.stop_reason == "end_turn"

    refused = ask(prompt, ENVIRONMENT, answered(first), results(first, "!not today"))
    assert "refused" in text_of(refused)
    assert "not today" in text_of(refused)


def test_the_subagents_prompt_is_itself_the_prompt_of_a_scenario_with_a_command():
    [(_, given)] = calls_of(ask(said("Let a subagent do it")))

    [(tool, _)] = calls_of(ask(said(given["prompt"])))
    assert tool == "Bash"


def test_the_plan_is_written_where_the_cli_wants_it():
    prompt = said("Make a plan first")
    enter = ask(prompt)
    mode = {
        "role": "system",
        "content": "You should create your plan at /home/x/plans/a-b.md using the Write tool.",
    }
    write = ask(prompt, answered(enter), results(enter, "Entered plan mode."), mode)

    [(_, given)] = calls_of(write)
    assert given["file_path"] == "/home/x/plans/a-b.md"


def test_a_question_has_an_answer_only_if_one_was_given():
    prompt = said("Ask me a question")
    question = ask(prompt)

    assert "I got your answers: blue" in text_of(ask(prompt, answered(question), results(question, "blue")))
    assert "I got no answer: no" in text_of(ask(prompt, answered(question), results(question, "!no")))


def test_a_prompt_that_fits_nothing_is_told_what_would_fit_and_that_this_is_no_ai():
    reply = ask(said("What is the meaning of life?"))

    assert text_of(reply).startswith(LABEL)
    assert "not an AI" in text_of(reply)
    assert all(scenario.prompt in text_of(reply) for scenario in SCENARIOS.known)


# Where the conversation stands


def test_each_answer_of_the_model_is_one_step_and_after_the_last_it_says_so():
    prompt = said(TWO_STEPS)
    one = ask(prompt, ENVIRONMENT)
    two = ask(prompt, ENVIRONMENT, answered(one), results(one, "x"))
    after = ask(
        prompt,
        ENVIRONMENT,
        answered(one),
        results(one, "x"),
        answered(two),
        {"role": "user", "content": [REMINDER]},
    )

    assert (text_of(one), text_of(two)) == ("one", "two")
    assert text_of(after) == f"{LABEL} The scenario is at its end."


def test_the_same_conversation_gets_the_same_answer_with_new_ids():
    first, again = ask(said(TWO_STEPS)), ask(said(TWO_STEPS))

    assert calls_of(first) == calls_of(again)
    assert not ids_of(first) & ids_of(again)


def test_an_answer_that_the_cli_split_into_two_messages_is_one_step():
    one = ask(said(TWO_STEPS))
    blocks = answered(one)["content"]
    split = [{"role": "assistant", "content": [block]} for block in blocks]

    assert text_of(ask(said(TWO_STEPS), *split, results(one, "x"))) == "two"


@pytest.mark.parametrize(
    "note",
    [
        "Continue from where you left off.",
        "continue",
        "<system-reminder>\nwrite hello.txt\n</system-reminder>",
    ],
)
def test_what_the_cli_adds_to_results_is_no_prompt(note: str):
    one = ask(said(TWO_STEPS))

    assert text_of(ask(said(TWO_STEPS), answered(one), results(one, "x", after=note))) == "two"


def test_the_fillers_of_a_session_that_was_killed_are_no_step():
    one = ask(said(TWO_STEPS))
    killed = [answered(one), results(one, "![Tool call interrupted]")]
    filler = {"role": "assistant", "content": [{"type": "text", "text": "No response requested."}]}

    assert text_of(ask(said(TWO_STEPS), *killed, filler, {"role": "user", "content": "Continue."})) == "two"


def test_a_prompt_after_an_interruption_shares_its_message_with_results_and_counts():
    one = ask(said(TWO_STEPS))
    interrupted = results(one, "!rejected", after="[Request interrupted by user for tool use]\n")
    interrupted["content"].append({"type": "text", "text": "Read hello.txt"})

    assert calls_of(ask(said(TWO_STEPS), answered(one), interrupted)) == [
        ("Read", {"file_path": "hello.txt"})
    ]


def test_a_message_sent_while_the_model_works_is_a_prompt():
    one = ask(said(TWO_STEPS))
    note = (
        "The user sent a new message while you were working:\nRead hello.txt\n\nThis is how Claude Code ..."
    )

    reply = ask(said(TWO_STEPS), answered(one), results(one, "x"), {"role": "system", "content": note})
    assert calls_of(reply) == [("Read", {"file_path": "hello.txt"})]


def test_the_second_prompt_of_a_session_starts_its_own_scenario():
    one = ask(said(TWO_STEPS))
    history = [said(TWO_STEPS), answered(one), results(one, "x"), answered(Reply((Text("two"),)))]

    assert calls_of(ask(*history, said("Read hello.txt"))) == [("Read", {"file_path": "hello.txt"})]


# Held calls


def test_held_calls_are_made_again_with_new_ids_and_then_the_scenario_goes_on_with_all_results():
    prompt = said(TWO_CALLS)
    both = ask(prompt)
    parked = results(both, "a ran", "!" + HELD, after="Continue from where you left off.")
    again = ask(prompt, answered(both), parked)

    assert calls_of(again) == [("Bash", {"command": "b"})]
    assert text_of(again) == ""
    assert not ids_of(again) & ids_of(both)

    end = ask(prompt, answered(both), parked, answered(again), results(again, "b ran"))
    assert text_of(end) == "ran: a ran\nb ran"


def test_a_call_may_be_held_again_and_again_without_the_scenario_advancing():
    history = [said(TWO_CALLS)]
    reply = ask(*history)
    history += [answered(reply), results(reply, "!" + HELD, "!" + HELD)]
    for _ in range(3):
        reply = ask(*history)
        assert sorted(given["command"] for _, given in calls_of(reply)) == ["a", "b"]
        history += [answered(reply), results(reply, "!" + HELD, "!" + HELD)]
    reply = ask(*history)
    history += [answered(reply), results(reply, "one", "!no")]

    assert text_of(ask(*history)).startswith("refused:")


def test_a_denial_among_the_results_is_remembered_over_the_repetition():
    prompt = said(TWO_CALLS)
    both = ask(prompt)
    first = [answered(both), results(both, "!no", "!" + HELD)]
    again = ask(prompt, *first)

    assert text_of(ask(prompt, *first, answered(again), results(again, "b ran"))) == "refused: no\nb ran"


def test_a_new_prompt_ends_what_was_held():
    both = ask(said(TWO_CALLS))
    reply = ask(said(TWO_CALLS), answered(both), results(both, "x", "!" + HELD), said("Read hello.txt"))

    assert calls_of(reply) == [("Read", {"file_path": "hello.txt"})]


def test_a_result_that_merely_quotes_the_marker_is_not_held():
    both = ask(said(TWO_CALLS))

    assert text_of(ask(said(TWO_CALLS), answered(both), results(both, "x", HELD))).startswith("ran:")


# What the CLI asks for itself


def test_a_request_for_a_title_gets_json_of_the_shape_it_asks_for():
    schema = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    title = f"<session>\n{TWO_STEPS}\n</session>"
    reply = ask(said(title), tools=[], output_config={"format": {"type": "json_schema", "schema": schema}})

    assert list(json.loads(text_of(reply))) == ["title"]


@pytest.mark.parametrize("tools", [None, []])
def test_a_request_without_tools_gets_plain_text(tools: Any):
    reply = ask(said("Web page content: write hello.txt with a greeting"), tools=tools, output_config=None)

    assert text_of(reply).startswith(LABEL)
    assert reply.stop_reason == "end_turn"


def test_a_request_for_a_summary_gets_text_though_tools_are_on_offer():
    reply = ask(said("CRITICAL: Respond with TEXT ONLY. Do NOT call any tools. Do not write a file."))

    assert calls_of(reply) == []
    assert text_of(reply).startswith(LABEL)


def test_a_conversation_may_be_a_string_or_empty():
    assert calls_of(ask({"role": "user", "content": "Read hello.txt"})) == [
        ("Read", {"file_path": "hello.txt"})
    ]
    assert text_of(ask()).startswith(LABEL)


# Scenarios in prompts


def test_a_scenario_in_the_prompt_comes_before_those_that_would_fit():
    assert text_of(ask(said(f"Write hello.txt with a greeting\n{TWO_STEPS}\nPlease."))) == "one"


def test_placeholders_are_filled_once_in_texts_and_inputs_and_unknown_ones_stay():
    given = "{a: ['{tool_result}', 1], b: {c: '{x}'}}"
    prompt = f"```scenario\n- {{text: '{{prompt}}|{{unknown}}', tools: [{{name: T, input: {given}}}]}}\n```"
    reply = ask(said(prompt))

    assert text_of(reply) == f"{prompt}|{{unknown}}"
    assert calls_of(reply) == [("T", {"a": ["", 1], "b": {"c": "{x}"}})]


def test_a_long_result_is_shortened():
    prompt = said(TWO_CALLS)
    both = ask(prompt)

    assert len(text_of(ask(prompt, answered(both), results(both, "x" * 9000, "y" * 9000)))) < 1000


def test_branches_that_repeat_an_outcome_belong_to_the_next_answer():
    steps = "\n".join(
        f"- {{when: {when}, tools: [{{name: {when}{n}}}]}}" for n in (1, 2) for when in ("ok", "denied")
    )
    prompt = said(f"```scenario\n{steps}\n```")
    first = ask(prompt)
    second = ask(prompt, answered(first), results(first, "!no"))

    assert [calls_of(first), calls_of(second)] == [[("ok1", {})], [("denied2", {})]]


def test_an_outcome_without_a_branch_ends_the_scenario_plainly():
    prompt = said("```scenario\n- tools: [{name: T}]\n- {when: ok, text: fine}\n```")
    first = ask(prompt)

    assert "no branch" in text_of(ask(prompt, answered(first), results(first, "!no")))


@pytest.mark.parametrize(
    ("yaml", "named"),
    [
        ("- {text: [}", "not YAML"),
        ("- {txt: a}", "0.txt"),
        ("- {text: a, when: maybe}", "0.when"),
        ("- {text: a, error: {status: 200}}", "status"),
        ("- {text: a, delay_s: -1}", "0.delay_s"),
        ("text: a", "scenario"),
        ("", "scenario"),
        ("- tools: [{name: T, input: &a {x: *a}}]", "not YAML"),
    ],
)
def test_a_bad_scenario_gets_a_plain_answer_that_names_the_error(yaml: str, named: str):
    reply = ask(said(f"```scenario\n{yaml}\n```"))

    assert text_of(reply).startswith(f"{LABEL} I cannot follow this scenario. ")
    assert named in text_of(reply)
    assert reply.stop_reason == "end_turn"


def test_what_yaml_knows_and_json_does_not_becomes_text():
    reply = ask(said("```scenario\n- tools: [{name: T, input: {day: 2026-01-31}}]\n```"))

    assert calls_of(reply) == [("T", {"day": "2026-01-31"})]


# Failures


def test_a_failure_is_said_by_the_reply():
    reply = ask(said("```scenario\n- error: {status: 529, type: overloaded_error, message: too much}\n```"))

    assert reply.failure
    assert (reply.failure.status, reply.failure.type, reply.failure.message) == (
        529,
        "overloaded_error",
        "too much",
    )


@pytest.mark.parametrize("status", ["cut", "malformed"])
def test_a_broken_stream_stops_in_its_last_block(status: str):
    reply = ask(
        said(f"```scenario\n- {{text: a b c d, tools: [{{name: T}}], error: {{status: {status}}}}}\n```")
    )
    stream = b"".join(sse(reply, "m"))

    assert stream.count(b"event: content_block_start") == 2
    assert stream.count(b"event: content_block_stop") == 1
    assert b"message_stop" not in stream
    assert (b"{not json" in stream) == (status == "malformed")


def test_an_answer_that_was_cut_off_is_given_whole_when_the_cli_asks_for_the_rest():
    prompt = said("```scenario\n- {text: before}\n- {text: a, tools: [{name: T}], error: {status: cut}}\n```")
    before = answered(Reply((Text("before"),)))
    survived = answered(Reply((Text("a"),)))
    note = {
        "role": "user",
        "content": [{"type": "text", "text": "Your response above was cut off mid-stream. Resume ..."}],
    }
    reply = ask(prompt, before, {"role": "user", "content": [REMINDER]}, survived, note, ENVIRONMENT)

    assert calls_of(reply) == [("T", {})]
    assert reply.failure is None


# The protocol


EVERY_BLOCK = Reply(
    (
        Thinking("First I think about it."),
        Text("Then I say something with ümlauts, and\nseveral lines."),
        ToolUse("Bash", {"command": "echo " + "long " * 20, "nested": {"list": [1, None, True]}}),
        ToolUse("ListAgents", {}),
    ),
    input_tokens=12,
)


def events_of(reply: Reply) -> list[RawMessageStreamEvent | dict[str, Any]]:
    """Returns the events of its stream, checked against the types of the official SDK."""
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    events: list[Any] = []
    for chunk in sse(reply, "claude-x"):
        kind, data = chunk.decode().removesuffix("\n\n").split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        events.append(event if event["type"] == "ping" else adapter.validate_python(event))
    return events


def test_a_stream_parses_as_the_official_events_and_adds_up_to_the_reply():
    events = events_of(EVERY_BLOCK)
    deltas = [event.delta for event in events if getattr(event, "type", "") == "content_block_delta"]

    assert (
        "".join(delta.thinking for delta in deltas if delta.type == "thinking_delta")
        == "First I think about it."
    )
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == EVERY_BLOCK.blocks[1].text
    inputs = "".join(delta.partial_json for delta in deltas if delta.type == "input_json_delta")
    assert inputs == json.dumps(EVERY_BLOCK.blocks[2].input) + "{}"
    assert sum(delta.type == "text_delta" for delta in deltas) > 2
    assert sum(delta.type == "input_json_delta" for delta in deltas) > 3


def test_an_answer_that_is_not_streamed_parses_as_the_official_message():
    parsed = Message.model_validate(message(EVERY_BLOCK, "claude-x"), strict=True)

    assert [block.type for block in parsed.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (parsed.model, parsed.stop_reason, parsed.usage.input_tokens) == ("claude-x", "tool_use", 12)
    assert parsed.usage.output_tokens > 10


def test_a_longer_request_counts_more_tokens():
    short = {"messages": [said("a")], "tools": []}

    assert 0 < count_tokens({}) < count_tokens(short) < count_tokens({**short, "system": "x" * 100})


# Files


def scenario_file(folder: Path, **changes: Any) -> Path:
    fields = {
        "name": "n",
        "description": "d",
        "prompt": "go",
        "match": "^GO",
        "steps": [{"text": f"{LABEL} hi"}],
    }
    (folder / "n.yaml").write_text(json.dumps(fields | changes))
    return folder


def test_scenarios_of_another_folder_can_be_used(tmp_path: Path):
    scenarios = Scenarios.load(scenario_file(tmp_path))

    assert [scenario.name for scenario in scenarios.known] == ["n"]
    assert scenarios.steps_for("Go on")[0].text == f"{LABEL} hi"


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": [{"text": "hi"}]},
        {"prompt": "stop"},
        {"match": "("},
        {"steps": [{"say": "x"}]},
        {"extra": 1},
    ],
)
def test_a_scenario_that_hides_what_it_is_or_is_unusable_does_not_load(
    tmp_path: Path, changes: dict[str, Any]
):
    with pytest.raises(ValidationError):
        Scenarios.load(scenario_file(tmp_path, **changes))
