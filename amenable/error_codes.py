"""Every code that a problem can end a command with, and what a person does about it: docs/troubleshooting.md is made of
this. Codes are stable: a sentence may be put better from one release to the next, its code stays.

What serving answers over HTTP has codes of its own, in OpenAI's form (`HTTP_CODES`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """A code, what it means, and what to do."""

    code: str
    means: str
    do: str


@dataclass(frozen=True)
class Symptom:
    """What a person sees, and the codes that it can have."""

    seen: str
    codes: tuple[Code, ...]


SYMPTOMS = (
    Symptom(
        "The recipe is refused",
        (
            Code(
                "recipe/not-found", "There is no such recipe file.", "`amenable recipes` lists those that come along."
            ),
            Code("recipe/unreadable", "The file is not YAML of `key: value` lines.", "Mend the line that is named."),
            Code(
                "recipe/setting", "A key is unknown or its value wrong.", "Look the key up in [recipes.md](recipes.md)."
            ),
            Code(
                "recipe/override",
                "A word of the command line is no `key=value`.",
                "Quote values with blanks or colons.",
            ),
            Code(
                "recipe/extends",
                "`extends` names no file, or leads in a circle.",
                "Correct the path in the file named.",
            ),
            Code("recipe/name", "The run's name has other signs than letters, digits, `.`, `_`, `-`.", "Rename it."),
            Code("recipe/stage", "The recipe has no stage of that name.", "Take one of those that are listed."),
            Code(
                "recipe/lengths",
                "Context, prompt and response lengths do not fit each other or the model.",
                "Raise the context lengths, or lower `tokens`.",
            ),
            Code(
                "recipe/transport",
                "The weight transport does not fit the placement.",
                "Use `rollouts.transport=object_store`.",
            ),
            Code(
                "recipe/division",
                "The model cannot be divided over so many devices.",
                "Take a `rollouts.tensor_parallel` that divides its heads.",
            ),
            Code("recipe/vocabulary", "`model.vocab_size` is too small for bytes and special tokens.", "Raise it."),
            Code(
                "recipe/world",
                "The built-in world cannot be split so.",
                "Choose another `world.heldout_share` or `world.validation_share`.",
            ),
        ),
    ),
    Symptom(
        "Data cannot be read or used",
        (
            Code(
                "data/not-found",
                "Nothing is at the path or address, or the glob matches nothing.",
                "Check it from the machine that runs the command.",
            ),
            Code("data/file-kind", "The file's name ends in no known kind.", "See [data.md](data.md) for the kinds."),
            Code(
                "data/unreadable",
                "The file is damaged, no UTF-8, no JSON, or the store refuses it.",
                "The sentence names file and line; for a store check keys and address.",
            ),
            Code(
                "data/format",
                "The columns fit no format, or two formats are mixed.",
                "Set `format`, or give each format a source of its own.",
            ),
            Code("data/row", "A row lacks a column, or holds what its format does not allow.", "Mend the row named."),
            Code(
                "data/table",
                "A table lacks columns or has other types than its schema.",
                "Make it anew with this version.",
            ),
            Code("data/no-source", "A part of the corpus has no source.", "Give `corpus.path`, or one for the part."),
            Code(
                "data/no-comparisons",
                "There are no comparisons and nobody to collect them from.",
                "Give `corpus.comparisons`, or leave `corpus` out.",
            ),
            Code("data/empty", "A part has no rows, or none is left for training.", "Give more or other data."),
            Code(
                "data/split",
                "Training or held-out rows are none.",
                "Change `held_out_fraction` or `split_seed`, or give rows of more users.",
            ),
            Code(
                "data/all-ties",
                "Nothing is ranked apart, so that a reward model learns nothing.",
                "Give comparisons with a preference.",
            ),
            Code(
                "data/too-long",
                "A row has more tokens than the model reads.",
                "Raise the limits of `tokens`, or leave the row out.",
            ),
            Code(
                "data/hub",
                "A data set of the Hugging Face Hub cannot be loaded.",
                "Check its name and split; a gated one needs `HF_TOKEN` in the environment.",
            ),
            Code("data/hub-package", "The package `datasets` is not installed.", "`pip install 'amenable[hub]'`"),
        ),
    ),
    Symptom(
        "Metrics or log lines cannot go where they should",
        (
            Code(
                "tracking/package", "The package `wandb` is not installed.", "`pip install wandb` where learners run."
            ),
            Code(
                "tracking/key",
                "The tracker's key is not in the environment.",
                "Set `WANDB_API_KEY` where learners run, or `tracking.wandb.mode=offline`.",
            ),
            Code(
                "tracking/refused",
                "Weights & Biases did not take the run.",
                "Mend what the sentence says, or `tracking.wandb.mode=offline`.",
            ),
            Code("run/log-format", "`AMENABLE_LOG` has another value than json or plain.", "Give one of the two."),
        ),
    ),
    Symptom(
        "A model or tokenizer does not load",
        (
            Code("model/not-found", "There is no such directory.", "Check the path, or give a name on the Hub."),
            Code(
                "model/load",
                "transformers cannot load it; the sentence has its reason.",
                "Load it with transformers alone; a private one needs `HF_TOKEN`.",
            ),
            Code("model/kind", "It is no model of the kind that is needed here.", "Give a causal language model."),
            Code(
                "model/weights",
                "Weights are missing, damaged, or of another shape.",
                "Give a complete checkpoint in safetensors.",
            ),
            Code(
                "model/tokenizer",
                "The tokenizer lacks EOS or PAD, is no fast one, or is not the model's.",
                "Mend its `tokenizer_config.json`.",
            ),
            Code(
                "model/chat-template", "The chat template refuses a prompt.", "Mend the template or the prompt named."
            ),
            Code(
                "model/vllm",
                "vLLM cannot serve the model.",
                "The sentence has vLLM's reason; see its supported models.",
            ),
        ),
    ),
    Symptom(
        "The reward does not score",
        (
            Code("reward/missing", "There is no trained reward model.", "Run `amenable rm RECIPE` first."),
            Code("reward/labels", "The classifier gives more than one number.", "Give one with a single label."),
            Code(
                "reward/vocabulary",
                "The reward model was trained with another tokenizer.",
                "Use it as `reward.kind: huggingface`.",
            ),
            Code(
                "reward/function", "The function cannot be imported, or it raised.", "The sentence has file and line."
            ),
            Code("reward/address", "`reward.url` is no address of a service.", "Give `http://HOST:PORT/PATH`."),
            Code(
                "reward/unreachable",
                "The service does not answer, or not in time.",
                "Start it; raise `reward.deadline_s` where it is slow.",
            ),
            Code(
                "reward/service",
                "The service refuses, or answers something else than scores.",
                "See [rewards.md](rewards.md); for 401 and 403 set `reward.token_variable`.",
            ),
            Code(
                "reward/token",
                "The variable that `reward.token_variable` names is not set, or no token.",
                "Set it where the scoring processes run.",
            ),
            Code("reward/scores", "A score is no finite number, or there are too many or too few.", "Mend the scorer."),
        ),
    ),
    Symptom(
        "A secret is where it could be read",
        (
            Code(
                "secret/given",
                "A recipe, an override or `--env` holds what looks like a secret.",
                "Set it in the environment of the processes that use it, and name the variable.",
            ),
        ),
    ),
    Symptom(
        "The run's directory or its lease",
        (
            Code("run/not-found", "There is no run there.", "Name the run's directory, or a name in `./runs`."),
            Code("run/directory", "The place holds something else, or cannot be made.", "Give another with `--run`."),
            Code("run/not-so-far", "The run has not come to what was asked for.", "Wait, or run the stage first."),
            Code("run/over", "What was asked for belongs to a stage that is done.", "There is nothing to do."),
            Code(
                "run/damaged",
                "A file of the run is not what the program wrote.",
                "Restore it; without it its stage is run again.",
            ),
            Code(
                "run/schema-version",
                "A file is of a version that this program does not read.",
                "Use the version of amenable that wrote it.",
            ),
            Code(
                "run/failed-for-good",
                "An earlier automatic attempt failed of what trying again cannot mend.",
                "Mend what the sentence says; after a change of data or cluster alone remove `failure.json`.",
            ),
            Code(
                "lease/held",
                "Another process writes to this run and lives.",
                "Stop it (`amenable stop RUN` for a job), or give another `--run`.",
            ),
            Code(
                "storage/locked",
                "Another process does not let go of a lock of the run.",
                "Look whether the process named, or the file system, hangs.",
            ),
            Code("lease/lost", "A newer attempt has taken the run over.", "Nothing: the newer one goes on."),
            Code(
                "lease/unusable",
                "The lease cannot be read or written.",
                "Check the rights; remove a damaged lease once nobody writes there.",
            ),
        ),
    ),
    Symptom(
        "Storage",
        (
            Code(
                "storage/address",
                "The address is none, or has keys in it.",
                "See [data.md](data.md); keys belong into the environment.",
            ),
            Code("storage/full", "The disk is full.", "Make room, and give the same command."),
            Code("storage/read", "A file cannot be read.", "Check that it exists, and its rights."),
            Code("storage/write", "A file cannot be written.", "Check room and rights."),
            Code(
                "storage/audit-log",
                "What was asked is done; only its entry in the audit log is missing.",
                "Do not ask again. Check room and rights of the log.",
            ),
            Code(
                "storage/unreachable",
                "The object store does not answer or refuses.",
                "Check keys, region and endpoint; the same command continues.",
            ),
        ),
    ),
    Symptom(
        "No cluster, or one that does not fit",
        (
            Code(
                "cluster/address",
                "That is no address of a cluster or a dashboard.",
                "`HOST:6379` to join, `http://HOST:8265` for jobs.",
            ),
            Code("cluster/unreachable", "Nobody answers there.", "Check address, network, and that Ray runs."),
            Code(
                "cluster/token",
                "The cluster does not take the token.",
                "Set `RAY_AUTH_MODE=token` and `RAY_AUTH_TOKEN_PATH`.",
            ),
            Code("cluster/session", "A local Ray session did not start.", "Look at memory and at `/dev/shm`."),
            Code("cluster/no-answer", "The cluster does not say what it has free.", "Look at its head's logs."),
            Code(
                "cluster/not-fit",
                "What a run needs is missing on a node.",
                "`amenable doctor RECIPE` tells each check.",
            ),
            Code(
                "cluster/too-small",
                "A process takes more memory than any node has.",
                "Take larger nodes and remove `failure.json`, or what `amenable plan RECIPE` says fits.",
            ),
            Code("cluster/variable", "A variable of `--env` is not set.", "Set it in the environment of the nodes."),
            Code(
                "placement/no-room",
                "Roles find no room beside the others.",
                "Ask for fewer or smaller ones, or add nodes; `amenable plan RECIPE` reckons.",
            ),
            Code(
                "placement/labels",
                "Roles ask for node labels that a session of one machine does not have.",
                "Leave `node_labels` out, or give `--address`.",
            ),
            Code(
                "devices/none",
                "The recipe asks for GPUs that this machine does not have.",
                "Set the keys named to 0, or give `--address`.",
            ),
            Code("plan/hardware", "The hardware named is unknown or does not fit.", "See [plan.md](plan.md)."),
        ),
    ),
    Symptom(
        "Jobs and manifests",
        (
            Code(
                "job/relative-directory",
                "The run would be kept in a directory that ends with the job.",
                "Give `--storage` or `--run` with an address or a mounted path.",
            ),
            Code(
                "job/live",
                "The run has a job that waits or runs.",
                "Follow it, stop it, or begin another with `--fresh`.",
            ),
            Code("job/not-found", "The cluster knows no such run, or several.", "`amenable list` tells them."),
            Code("job/not-running", "The run's job has ended already.", "`amenable resume RUN` goes on with it."),
            Code("job/not-ended", "The job did not end within the grace.", "Ray kills it; the last checkpoint stands."),
            Code("job/grace", "Its grace is shorter than what was asked for.", "Submit with a longer `--grace`."),
            Code("job/owner", "The run is somebody else's, or the owner's name cannot be one.", "Give `--owner NAME`."),
            Code(
                "job/changed",
                "The recipe is not what the run was begun with.",
                "Go back to the commit named, or submit it as a run of its own.",
            ),
            Code("job/option", "An option of `submit` does not fit.", "The sentence says what would."),
            Code(
                "job/working-directory",
                "The directory that travels lacks what the job needs.",
                "`--working-dir DIR`, or another `--exclude`.",
            ),
            Code("job/too-large", "The directory is larger than Ray takes.", "Leave files out with `--exclude`."),
            Code("job/refused", "The cluster refused the request.", "The sentence has Ray's reason."),
            Code("manifests/place", "Pods would not have this path.", "Give one below `/shared`, or an address."),
            Code(
                "manifests/parts",
                "`--parts` names something else.",
                "`storage`, `common`, `train`, `serve`, `interactive`.",
            ),
            Code("manifests/label", "A node label has a name of the manifests' own.", "Give it another name."),
            Code("manifests/invalid", "KubeRay would refuse what was rendered.", "Change what the sentence names."),
        ),
    ),
    Symptom(
        "Training ends",
        (
            Code("learners/not-finite", "A loss or a gradient is NaN or infinite.", "Lower the learning rate."),
            Code(
                "ppo/not-finite",
                "A loss of PPO, or a held-out reward, is not finite.",
                "Lower the learning rate; look at the reward's scale.",
            ),
            Code(
                "ppo/mismatch",
                "Engine and learner disagree on log-probabilities beyond the bound.",
                "Use one dtype for both; see [reliability.md](reliability.md).",
            ),
            Code(
                "ppo/off-policy",
                "The weights that wrote a batch are too far from the learner's.",
                "Lower `ppo.max_staleness` or the learning rate.",
            ),
            Code(
                "ppo/straggler",
                "An episode took longer than the bound that the recipe sets.",
                "Look at the generator that wrote it.",
            ),
            Code(
                "episodes/deadline",
                "Episodes of a batch did not come in time.",
                "The sentence says who owes them; raise `ppo.batch_deadline_s` where that is only slow.",
            ),
            Code(
                "episodes/order",
                "Something came in an order that must not be: a stale attempt, or a mistake.",
                "The same command continues; report it where it comes again.",
            ),
            Code(
                "publication/transport",
                "Weights could not be sent to the engines.",
                "Use `rollouts.transport=object_store`.",
            ),
            Code("publication/mapping", "An engine holds other tensors than the learner publishes.", "Report it."),
            Code(
                "publication/damaged",
                "A snapshot's bytes are not those of its checksum.",
                "The same command continues; look at the disk.",
            ),
            Code(
                "publication/lost",
                "A snapshot is gone, or did not come out of the object store in time.",
                "The same command continues; look at the store's memory.",
            ),
            Code(
                "fleet/restarts-spent",
                "A worker died more often than `fleet` allows.",
                "Its logs tell why; the same command continues.",
            ),
            Code(
                "fleet/too-few",
                "Too few workers serve for too long.",
                "Look at their nodes; the same command continues.",
            ),
            Code("fleet/refused", "A generator's probe does not agree with the learner.", "See `ppo/mismatch`."),
            Code(
                "fleet/generator-failed", "A generator has failed and answers no more.", "The sentence has its reason."
            ),
            Code(
                "fleet/unscored",
                "Episodes could not be scored, whoever tried.",
                "Look at the scorer's memory and logs.",
            ),
            Code("fleet/order", "A worker was asked for what it was not ready for.", "Report it."),
            Code(
                "fleet/wish",
                "That is no number of generators, or the wish cannot be read.",
                "`amenable scale RUN generators=4`",
            ),
            Code("fleet/overtaken", "Somebody else changed the wish meanwhile.", "Look, and ask again."),
            Code(
                "learners/lost",
                "A learner died or fell silent, more often than is borne.",
                "Look at memory; the same command continues from the last checkpoint.",
            ),
            Code(
                "learners/superseded",
                "A rank that was thought dead lives on, and stops.",
                "Nothing: its successor goes on.",
            ),
            Code("learners/stop", "No checkpoint came within the grace.", "Raise `learners.stop_grace_s`."),
            Code(
                "checkpoint/write",
                "A checkpoint was not written, or an old one not removed.",
                "Make room; earlier ones are intact.",
            ),
            Code(
                "checkpoint/unreadable",
                "No checkpoint can be read, or it is of another model.",
                "Put back what is named; to begin the stage anew, remove its checkpoints.",
            ),
            Code("stage/incomplete", "A stage lacks what it should have written.", "Run the stage named again."),
            Code("stage/not-finite", "A stage found a value that is no number.", "Look at its metrics."),
            Code("evaluation/answers", "The answers cannot be compared.", "Run `eval` again with all models."),
            Code("evaluation/not-converged", "The length-controlled win rate did not converge.", "Give more prompts."),
        ),
    ),
    Symptom(
        "Something died or does not answer",
        (
            Code(
                "run/process-died",
                "A process of the run was killed, or its node was lost.",
                "Look for memory; the same command continues.",
            ),
            Code(
                "run/no-answer",
                "A role did not answer in time.",
                "Raise the deadline that is named where it is only slow; the same command continues.",
            ),
            Code(
                "run/unexpected",
                "Something that nobody foresaw; the sentence has its kind.",
                "`logs/` has its traceback. Where it is no want of memory, report it with the output of `--json`, "
                "`amenable doctor` and the versions.",
            ),
            Code(
                "publication/settle",
                "The last weights of PPO did not reach all places in time; a note, not an end.",
                "Services take the exports instead.",
            ),
            Code("bench/measurement", "A measurement of `bench/` could not be taken.", "Run it on a quieter machine."),
        ),
    ),
    Symptom(
        "The service",
        (
            Code(
                "serving/open",
                "It would be reachable from elsewhere, and nobody needs a token.",
                "`amenable tokens add FILE NAME`, then `--token-file FILE`.",
            ),
            Code(
                "serving/tokens",
                "A token file, a token or its scopes are not as they should be.",
                "`amenable tokens add FILE NAME`",
            ),
            Code(
                "serving/sessions",
                "The secret of browsers' sessions cannot be kept or read.",
                "Check the rights of the run's `serving/`.",
            ),
            Code("serving/port", "The service cannot listen there.", "Give another `--port` or `--host`."),
            Code(
                "serving/mirror",
                "The files of a run in an object store are damaged there, or cannot be brought here.",
                "Check the store, and the room in `AMENABLE_WORKING_COPIES`.",
            ),
            Code("serving/start", "The service did not start, or has ended.", "The sentence has Ray Serve's reason."),
            Code("serving/no-model", "The run has nothing yet that could be served.", "Wait until SFT is done."),
            Code("serving/version", "The run has no such version.", "Take one of those that are listed, or `newest`."),
            Code("serving/channel", "The deployment names another run, or no model.", "Correct its `user_config`."),
            Code(
                "serving/wish",
                "The wish cannot be read.",
                "Write it anew with `amenable pin RUN newest`.",
            ),
            Code("serving/overtaken", "Somebody else changed the wish meanwhile.", "Look, and ask again."),
            Code(
                "serving/weights",
                "An engine cannot take a model's weights.",
                "All models of a service have one shape; raise `serving.load_deadline_s` where it is slow.",
            ),
            Code(
                "serving/engine",
                "An engine died, is broken or does not answer.",
                "Its replica is replaced; see its logs.",
            ),
            Code(
                "serving/comparison",
                "A comparison of the page cannot be kept or read.",
                "Look at `serving/comparisons` in the run's directory.",
            ),
        ),
    ),
)

HTTP_CODES = (
    Code("invalid_value", "400: something in the request is wrong.", "`param` names it."),
    Code("invalid_body", "400: the page's request is not what it should be.", "Load the page again."),
    Code("busy", "503: somebody else writes the file that the request is to change.", "Ask again in a few seconds."),
    Code("not_possible", "400: what was asked for cannot be.", "The message says why."),
    Code("invalid_token", "401: no token, or one that is not known or was revoked.", "`Authorization: Bearer amn_…`"),
    Code(
        "forbidden", "403: without tokens the service answers its own machine alone.", "Start it with `--token-file`."
    ),
    Code("missing_scope", "403: the token may not do that.", "`amenable tokens add FILE NAME --scopes …`"),
    Code("missing_csrf_token", "403: a browser's session lacks its header.", "Load the page again."),
    Code("invalid_csrf", "403: the header is of another session.", "Load the page again."),
    Code("not_found", "404: there is nothing at this path.", "See [serving.md](serving.md) for the paths."),
    Code("model_not_found", "404: no such model, or not yet.", "`GET /v1/models` lists them."),
    Code("body_timeout", "408: the body did not arrive in time.", "Send it again."),
    Code("changed_meanwhile", "409: somebody else changed it since.", "Look, and ask again."),
    Code("body_too_large", "413: the body is larger than the service takes.", "Send less; `serving` has the limits."),
    Code("too_large", "413: the page's request is larger than it takes.", "Send less."),
    Code("unsupported_media_type", "415: the body is not JSON.", "`Content-Type: application/json`"),
    Code("not_json", "415: the page's request is not JSON.", "Load the page again."),
    Code("too_many_requests", "429: as many requests as the service takes are under way.", "Wait for `Retry-After`."),
    Code("run_problem", "500: the run's files do not allow it.", "The message has the sentence of the problem."),
    Code("model_loading", "503: the model's weights are being loaded.", "Wait for `Retry-After`."),
    Code("engine_lost", "503: this replica's engine has died.", "Wait for `Retry-After`: its replica is replaced."),
    Code("scorer_lost", "503: the reward model's process has died.", "Wait for `Retry-After`: it is replaced."),
    Code("unhealthy", "503: an engine does not answer.", "Wait for `Retry-After`: its replica is replaced."),
    Code("time_limit", "503: the request took longer than its limit.", "Ask for fewer tokens."),
)
"""What serving answers, as `error.code` of OpenAI's form, and what its page is answered."""
