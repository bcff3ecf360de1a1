"""Which test of test_store.py misses each safeguard that can be taken away."""

# By seeded bug, a test that must fail with it.
MISSED_BY = {
    "stale_owners_write": "test_a_stale_owner_writes_nothing",
    "any_input_runs": "test_the_edited_input_is_what_may_run",
    "refused_calls_run": "test_a_denied_call_is_never_claimed",
    "claims_are_not_counted": "test_an_allowed_call_is_claimed_once",
    "the_last_decision_wins": "test_of_decisions_at_once_the_first_wins",
    "a_message_decides": "test_a_message_decides_nothing",
    "time_allows": "test_what_is_due_expires_and_nothing_else",
    "unknown_calls_run_again": "test_a_claimed_call_without_a_result_becomes_unknown_once",
    "events_repeat": "test_the_same_event_id_is_committed_once",
    "nobody_is_told": "test_a_decision_wakes_the_owner",
    "interrupted_calls_run": "test_nothing_is_claimed_once_interrupted",
    "acknowledged_before_it_is_kept": "test_the_edited_input_is_what_may_run",
    "idempotency_keys_are_forgotten": "test_an_idempotency_key_repeats_the_reply",
    "what_waits_is_deleted": "test_what_waits_is_never_too_old",
    "epochs_are_not_raised": "test_an_owner_that_is_replaced_hears_of_it",
}
