from sgfast.examples import presets


def test_a_few_steps_bring_the_student_closer(capsys):
    before, after = presets.main(steps=8, batch_size=2)
    assert after.kl < 0.8 * before.kl
    printed = capsys.readouterr().out
    for name in ("kd_loss", "hidden_cos_3_15", "hidden_hidden_mse_6_30", f"KL from the teacher {after.kl:.3f} nats"):
        assert name in printed
