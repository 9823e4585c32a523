BEGIN TRANSACTION;
CREATE TABLE attempts (
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
        ) STRICT;
INSERT INTO "attempts" VALUES('8bb6f809-ca7d-42b7-8783-6395609ec7d7','00000001-0000-4000-8000-000000000000','user-1','{"task_id": "00000001-0000-4000-8000-000000000000", "user_id": "user-1", "source_image_url": "uploads/user-1/1", "prompts": ["cat", "black dog"]}','request-1',NULL,NULL,2722.01126861,0,2722.01126861,NULL,NULL,0,1,0,NULL,'[]');
INSERT INTO "attempts" VALUES('4988d4a1-5e47-4f11-a747-62064abc03fc','00000002-0000-4000-8000-000000000000','user-1','{"task_id": "00000002-0000-4000-8000-000000000000", "user_id": "user-1", "source_image_url": "uploads/user-1/2", "prompts": ["cat", "black dog"]}','request-1',NULL,'old',0.0,0,NULL,NULL,NULL,1,0,0,NULL,'[]');
CREATE TABLE given_up (
            task_id TEXT NOT NULL,
            user_id TEXT NOT NULL,
            task TEXT NOT NULL,
            image_sha256 TEXT,
            server_version TEXT NOT NULL,
            error_message TEXT NOT NULL,
            given_up_at TEXT NOT NULL,
            PRIMARY KEY (task_id, user_id)
        ) STRICT;
CREATE TABLE set_aside (found_at TEXT NOT NULL, reason TEXT NOT NULL, content TEXT NOT NULL) STRICT;
CREATE TABLE unneeded_masks (key TEXT PRIMARY KEY, due_s REAL NOT NULL) STRICT;
CREATE INDEX attempts_due ON attempts (due_s) WHERE owner IS NULL;
CREATE INDEX attempts_owner ON attempts (owner) WHERE owner IS NOT NULL;
CREATE INDEX attempts_begun ON attempts (begun) WHERE begun > 0;
CREATE INDEX attempts_lease ON attempts (renew_at_s) WHERE owner IS NULL;
CREATE INDEX attempts_undelivered ON attempts (due_s) WHERE outcome IS NOT NULL;
COMMIT;
PRAGMA user_version = 2;
