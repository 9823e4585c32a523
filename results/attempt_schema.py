"""The schema of the file of attempts (`DATA_DIR/outbox.sqlite`), one tuple of statements per version."""

from typing import Final

MIGRATIONS: Final = (
    # Version 1: what server 0.1.0 wrote, without a version.
    (
        """CREATE TABLE IF NOT EXISTS attempts (
            attempt_id TEXT PRIMARY KEY,
            task TEXT NOT NULL,
            outcome TEXT,
            starts INTEGER NOT NULL,
            tries INTEGER NOT NULL DEFAULT 0,
            due_s REAL NOT NULL
        ) STRICT""",
    ),
    # Version 2: one attempt per task, with its owner, lease, deaths and masks.
    (
        "ALTER TABLE attempts RENAME TO attempts_1",
        """CREATE TABLE attempts (
            attempt_id TEXT PRIMARY KEY,
            task_id TEXT NOT NULL,
            user_id TEXT NOT NULL,
            task TEXT NOT NULL,
            request_id TEXT NOT NULL DEFAULT '-',
            outcome TEXT,
            owner TEXT,
            due_s REAL NOT NULL DEFAULT 0,
            tries INTEGER NOT NULL DEFAULT 0,
            renew_at_s REAL,
            waiting_since_s REAL,
            waiting_for TEXT,
            begun INTEGER NOT NULL DEFAULT 0,
            deaths INTEGER NOT NULL DEFAULT 0,
            deaths_alone INTEGER NOT NULL DEFAULT 0,
            image_sha256 TEXT,
            mask_keys TEXT NOT NULL DEFAULT '[]',
            UNIQUE (task_id, user_id)
        ) STRICT""",
        "CREATE INDEX attempts_due ON attempts (due_s) WHERE owner IS NULL",
        "CREATE INDEX attempts_owner ON attempts (owner) WHERE owner IS NOT NULL",
        "CREATE INDEX attempts_begun ON attempts (begun) WHERE begun > 0",
        "CREATE INDEX attempts_lease ON attempts (renew_at_s) WHERE owner IS NULL",
        "CREATE INDEX attempts_undelivered ON attempts (due_s) WHERE outcome IS NOT NULL",
        """CREATE TABLE given_up (
            task_id TEXT NOT NULL,
            user_id TEXT NOT NULL,
            task TEXT NOT NULL,
            image_sha256 TEXT,
            server_version TEXT NOT NULL,
            error_message TEXT NOT NULL,
            given_up_at TEXT NOT NULL,
            PRIMARY KEY (task_id, user_id)
        ) STRICT""",
        "CREATE TABLE unneeded_masks (key TEXT PRIMARY KEY, due_s REAL NOT NULL) STRICT",
        "CREATE TABLE set_aside (found_at TEXT NOT NULL, reason TEXT NOT NULL, content TEXT NOT NULL) STRICT",
        # Of several attempts at a task, one that has ended is kept before the others. Version 1 could end an
        # attempt as pending; such a task is attempted again.
        """INSERT OR IGNORE INTO attempts (attempt_id, task_id, user_id, task, tries, outcome)
            SELECT attempt_id, json_extract(task, '$.task_id'), json_extract(task, '$.user_id'), task,
                tries, CASE WHEN outcome LIKE '%"status": "pending"%' THEN NULL ELSE outcome END
            FROM attempts_1
            WHERE CASE WHEN json_valid(task) THEN json_type(task, '$.task_id') = 'text'
                AND json_type(task, '$.user_id') = 'text' END
            ORDER BY outcome IS NULL, due_s""",
        """INSERT INTO set_aside
            SELECT datetime(), 'not readable', json_array(attempt_id, task, outcome) FROM attempts_1
            WHERE coalesce(CASE WHEN json_valid(task) THEN json_type(task, '$.task_id') = 'text'
                AND json_type(task, '$.user_id') = 'text' END, 0) = 0""",
        "DROP TABLE attempts_1",
    ),
    # Version 3: the work of requests that are no tasks.
    ("CREATE TABLE other_work (work_id TEXT PRIMARY KEY, owner TEXT NOT NULL) STRICT",),
)
