BEGIN TRANSACTION;
CREATE TABLE attempts (
    attempt_id TEXT PRIMARY KEY,
    task TEXT NOT NULL,
    outcome TEXT,
    starts INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    due_s REAL NOT NULL
) STRICT;
INSERT INTO "attempts" VALUES('7cb9d870-4f7a-4c3f-b7c2-61f7a4ba71fc','{"task_id": "00000002-0000-4000-8000-000000000000", "user_id": "user-1", "source_image_url": "uploads/user-1/2", "prompts": ["cat", "black dog"]}',NULL,1,0,1.79565414882964038845e+09);
INSERT INTO "attempts" VALUES('89afecb4-113e-4e3f-add3-1f05f9a8fc45','{"task_id": "00000004-0000-4000-8000-000000000000", "user_id": "user-1", "source_image_url": "uploads/user-1/4", "prompts": ["cat", "black dog"]}','{"status": "done", "mask_url": "file:///mask4", "labels": ["cat"], "metadata": {"confidence": 0.5}, "error_message": null}',1,1,1.79565402984722089765e+09);
INSERT INTO "attempts" VALUES('8cf1c984-264c-4397-94a8-53aeab39db93','{"task_id": "00000005-0000-4000-8000-000000000000", "user_id": "user-1", "source_image_url": "uploads/user-1/5", "prompts": ["cat", "black dog"]}','{"status": "error", "mask_url": null, "labels": null, "metadata": null, "error_message": "corrupt"}',1,1,1.79565402995202207572e+09);
INSERT INTO "attempts" VALUES('ba0ddf1d-60fe-494a-89fb-2320eb3870d0','{"task_id": "00000006-0000-4000-8000-000000000000", "user_id": "user-1", "source_image_url": "uploads/user-1/6", "prompts": ["cat", "black dog"]}','{"status": "pending", "mask_url": null, "labels": null, "metadata": null, "error_message": null}',1,1,1.79565402990534448627e+09);
INSERT INTO "attempts" VALUES('e85bedf3-a8bb-43ec-b388-5297f2813ad2','{"task_id": "00000007-0000-4000-8000-000000000000", "user_id": "user-1", "source_image_url": "uploads/user-1/7", "prompts": ["cat", "black dog"]}',NULL,0,1,1.79565402994611787801e+09);
INSERT INTO "attempts" VALUES('0dd2dd35-25a2-4fd3-acae-6ddca1fab5ff','{"task_id": "00000007-0000-4000-8000-000000000000", "user_id": "user-1", "source_image_url": "uploads/user-1/7", "prompts": ["cat", "black dog"]}',NULL,0,1,1.79565402976814675328e+09);
COMMIT;
