"""The model of four sub-languages: its corpus, its training, and how it is saved."""

import pytest
import torch

from circuitlab.errors import FileFormatError, InputError
from circuitlab.gallery import sublanguages
from circuitlab.gallery.sublanguages import LENGTH, SHARED, Corpus, load, main, save, train


def test_corpus_keeps_to_its_grammars():
    corpus = Corpus()
    assert len(corpus.names) == len(set(corpus.names)) == 112
    documents, language = corpus.documents(200, seed=5)
    assert torch.equal(documents, corpus.documents(200, seed=5)[0]) and not torch.equal(documents, corpus.documents(200, seed=6)[0])
    for number, name in enumerate(corpus.languages):
        own = {corpus.names[i] for i in documents[language == number].unique().tolist()} - set(SHARED)
        assert own and all(set(word[::2]) <= set(sublanguages.LANGUAGES[name]) for word in own)
        follows = {}
        for document in documents[language == number].tolist():
            for word, following in zip(document, document[1:]):
                follows.setdefault(word, set()).add(following)
        assert max(map(len, follows.values())) == 4
    shared = (documents < len(SHARED)).float().mean().item()
    assert 0.2 < shared < 0.6


def test_training_is_repeatable_and_leaves_random_state_alone(tmp_path):
    state = torch.random.get_rng_state()
    one, two = (train(3, (0, 2), held_out=40, progress=False) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.loss == two.loss and list(one.checkpoints) == [0, 2, 3]
    assert len(one.labels) == sum(len(x) for x, _ in one.batches) == 40
    x, y = one.batches[0]
    assert x.shape == (32, LENGTH) and torch.equal(x[:, 1:], y[:, :-1])
    assert all(torch.equal(one.checkpoints[3][name], tensor) for name, tensor in one.model.state_dict().items())
    assert not torch.equal(one.checkpoints[2]["readout.weight"], one.checkpoints[3]["readout.weight"])
    assert train(3, held_out=40, seed=1, progress=False).loss != one.loss

    again = load(save(one, tmp_path / "model.safetensors"), held_out=40)
    assert again.loss == one.loss and again.labels == one.labels and again.names == one.names
    assert torch.equal(torch.random.get_rng_state(), state)


def test_command_and_errors(tmp_path, capsys):
    main(["-o", str(tmp_path / "model.safetensors"), "--steps", "2", "--seed", "4"])
    assert "nats per token" in capsys.readouterr().out
    assert load(tmp_path / "model.safetensors").names == Corpus(4).names
    with pytest.raises(InputError, match="steps=0"):
        train(0)
    with pytest.raises(InputError, match="model.safetensors"):
        main(["-o", str(tmp_path / "model.bin"), "--steps", "0"])
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(FileFormatError, match="broken"):
        load(tmp_path / "broken.safetensors")
