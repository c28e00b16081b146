-- The same statements for SQLite and PostgreSQL. Rows of one exchange lie together: ids begin with the time.

CREATE TABLE exchanges (
    exchange_id TEXT PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    settled_ms BIGINT NOT NULL,
    key_name TEXT NOT NULL,
    team TEXT,
    user_name TEXT,
    user_digest TEXT,
    tags TEXT NOT NULL,
    metadata TEXT NOT NULL,
    asked TEXT NOT NULL,
    route TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    streamed SMALLINT NOT NULL,
    tier TEXT,
    backend TEXT,
    model TEXT,
    model_version TEXT,
    outcome TEXT NOT NULL,
    error TEXT,
    degraded SMALLINT NOT NULL,
    calls INTEGER NOT NULL,
    served INTEGER,
    estimated SMALLINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL,
    counted SMALLINT NOT NULL,
    input_nusd BIGINT NOT NULL,
    cached_input_nusd BIGINT NOT NULL,
    output_nusd BIGINT NOT NULL,
    gpu_nusd BIGINT NOT NULL,
    wasted_nusd BIGINT NOT NULL,
    baseline_nusd BIGINT NOT NULL,
    baseline_tier TEXT,
    queued_us BIGINT NOT NULL,
    first_token_us BIGINT,
    decided_us BIGINT NOT NULL,
    confidence DOUBLE PRECISION,
    confidence_kind TEXT NOT NULL,
    config TEXT NOT NULL,
    request_id TEXT NOT NULL,
    instance TEXT NOT NULL,
    at_hour BIGINT GENERATED ALWAYS AS (at_ms / 3600000) STORED
);
CREATE INDEX exchanges_settled ON exchanges (settled_ms);
-- All that the usual reports read, in the order in which they group it: nothing is sorted, no row is fetched.
CREATE INDEX exchanges_reported ON exchanges (
    at_hour, key_name, team, route, tier, outcome, calls, estimated, prompt_tokens, cached_prompt_tokens,
    completion_tokens, reasoning_tokens, input_nusd, cached_input_nusd, output_nusd, gpu_nusd, wasted_nusd,
    baseline_nusd
);

CREATE TABLE attempts (
    exchange_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    role TEXT NOT NULL,
    tier TEXT NOT NULL,
    backend TEXT NOT NULL,
    model TEXT NOT NULL,
    model_version TEXT,
    outcome TEXT NOT NULL,
    fault TEXT,
    estimated SMALLINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL,
    counted SMALLINT NOT NULL,
    price_version TEXT NOT NULL,
    input_nusd BIGINT NOT NULL,
    cached_input_nusd BIGINT NOT NULL,
    output_nusd BIGINT NOT NULL,
    gpu_nusd BIGINT NOT NULL,
    started_ms BIGINT NOT NULL,
    waited_us BIGINT NOT NULL,
    first_token_us BIGINT,
    ended_ms BIGINT NOT NULL,
    confidence DOUBLE PRECISION,
    doubt_below DOUBLE PRECISION,
    PRIMARY KEY (exchange_id, number)
);
CREATE INDEX attempts_of_gpus ON attempts (backend, ended_ms) WHERE gpu_nusd <> 0;

CREATE TABLE deliveries (
    exchange_id TEXT PRIMARY KEY,
    delivered SMALLINT NOT NULL,
    total_us BIGINT NOT NULL
);

CREATE TABLE decision_inputs (
    exchange_id TEXT PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    feature_version TEXT NOT NULL,
    features BYTEA NOT NULL,
    facts TEXT NOT NULL,
    scores TEXT NOT NULL,
    fleet TEXT NOT NULL,
    thresholds TEXT NOT NULL,
    propensity DOUBLE PRECISION NOT NULL,
    artefacts TEXT NOT NULL
);

CREATE TABLE open_exchanges (
    exchange_id TEXT PRIMARY KEY,
    instance TEXT NOT NULL,
    seen_ms BIGINT NOT NULL,
    bill TEXT NOT NULL
);

CREATE TABLE refusals (
    hour BIGINT NOT NULL,
    instance TEXT NOT NULL,
    key_name TEXT NOT NULL,
    code TEXT NOT NULL,
    requests BIGINT NOT NULL,
    PRIMARY KEY (hour, instance, key_name, code)
);

CREATE TABLE prices (
    version TEXT PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    tier TEXT NOT NULL,
    backend TEXT NOT NULL,
    kind TEXT NOT NULL,
    input_nusd BIGINT NOT NULL,
    cached_input_nusd BIGINT NOT NULL,
    output_nusd BIGINT NOT NULL,
    hour_nusd BIGINT
);

CREATE TABLE instances (
    instance TEXT PRIMARY KEY,
    heard_ms BIGINT NOT NULL
);

CREATE TABLE server_meters (
    backend TEXT NOT NULL,
    hour BIGINT NOT NULL,
    instance TEXT NOT NULL,
    from_ms BIGINT NOT NULL,
    until_ms BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    busy_ms BIGINT NOT NULL,
    ready_ms BIGINT NOT NULL,
    restarts INTEGER NOT NULL,
    PRIMARY KEY (backend, hour, instance, from_ms)
);

CREATE TABLE closings (
    backend TEXT NOT NULL,
    hour BIGINT NOT NULL,
    revision INTEGER NOT NULL,
    tier TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    hour_nusd BIGINT NOT NULL,
    shares_nusd BIGINT NOT NULL,
    idle_nusd BIGINT NOT NULL,
    outside_nusd BIGINT NOT NULL,
    busy_ms BIGINT NOT NULL,
    attempts BIGINT NOT NULL,
    price_version TEXT NOT NULL,
    instance TEXT NOT NULL,
    provisional_nusd BIGINT NOT NULL,
    decode_weight INTEGER NOT NULL,
    made_from TEXT NOT NULL,
    PRIMARY KEY (backend, hour, revision)
);

CREATE TABLE adjustments (
    exchange_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    hour BIGINT NOT NULL,
    revision INTEGER NOT NULL,
    backend TEXT NOT NULL,
    share_nusd BIGINT NOT NULL,
    change_nusd BIGINT NOT NULL,
    at_ms BIGINT NOT NULL,
    key_name TEXT NOT NULL,
    team TEXT,
    route TEXT NOT NULL,
    tier TEXT NOT NULL,
    shown SMALLINT NOT NULL,
    at_hour BIGINT GENERATED ALWAYS AS (at_ms / 3600000) STORED,
    PRIMARY KEY (exchange_id, number, hour, revision)
);
CREATE INDEX adjustments_reported ON adjustments (
    at_hour, key_name, team, route, tier, shown, backend, change_nusd
);
CREATE INDEX adjustments_of_hours ON adjustments (backend, hour);

CREATE TABLE alerts (
    id TEXT NOT NULL,
    claim INTEGER NOT NULL,
    at_ms BIGINT NOT NULL,
    claimed_ms BIGINT NOT NULL,
    kind TEXT NOT NULL,
    payload TEXT NOT NULL,
    instance TEXT NOT NULL,
    PRIMARY KEY (id, claim)
);
CREATE INDEX alerts_at ON alerts (at_ms);

CREATE TABLE alert_endings (
    id TEXT NOT NULL,
    webhook TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    ending TEXT NOT NULL,
    PRIMARY KEY (id, webhook)
);
CREATE INDEX alert_endings_at ON alert_endings (at_ms);
