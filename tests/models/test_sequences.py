from models.sequences import sequence_batch


def test_rows_are_padded_on_the_right_and_masks_tell_prompt_response_and_pads_apart():
    batch = sequence_batch([[5, 6], [7]], [[8, 1], [9]])
    assert batch.tokens.tolist() == [[5, 6, 8, 1], [7, 9, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_a_width_fixes_the_shape_and_an_empty_batch_has_one():
    assert sequence_batch([[5]], [[8]], width=6).tokens.shape == (1, 6)
    assert sequence_batch([], []).tokens.shape == (0, 1)
