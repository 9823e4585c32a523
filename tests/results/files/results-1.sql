BEGIN TRANSACTION;
CREATE TABLE "segmentation_results" (
    id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL,
    source_image_url TEXT NOT NULL,
    mask_image_url TEXT,
    text_prompt TEXT NOT NULL,
    labels TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(labels)),
    metadata TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(metadata)),
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'processing', 'done', 'error')),
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    CHECK (status <> 'done' OR mask_image_url IS NOT NULL)
) STRICT;
INSERT INTO "segmentation_results" VALUES('00000001-0000-4000-8000-000000000000','user-1','uploads/user-1/1','file:///mask','cat, black dog','["cat"]','{"attempt": "dbda5eee-b95b-4e80-b75d-b9c45f2912f1", "confidence": 0.5}','done','2026-11-26T00:47:08.828700+00:00','2026-11-26T00:47:08.829228+00:00');
INSERT INTO "segmentation_results" VALUES('00000002-0000-4000-8000-000000000000','user-1','uploads/user-1/2',NULL,'cat, black dog','[]','{"attempt": "7cb9d870-4f7a-4c3f-b7c2-61f7a4ba71fc"}','processing','2026-11-26T00:47:08.829847+00:00','2026-11-26T00:47:08.829806+00:00');
INSERT INTO "segmentation_results" VALUES('00000003-0000-4000-8000-000000000000','user-1','uploads/user-1/3',NULL,'cat, black dog','[]','{"attempt": "84f702c3-8843-407b-a378-d6a85d75765e", "error_message": "corrupt"}','error','2026-11-26T00:47:08.830237+00:00','2026-11-26T00:47:08.830514+00:00');
INSERT INTO "segmentation_results" VALUES('00000004-0000-4000-8000-000000000000','user-1','uploads/user-1/4',NULL,'cat, black dog','[]','{"attempt": "89afecb4-113e-4e3f-add3-1f05f9a8fc45"}','processing','2026-11-26T00:47:08.831054+00:00','2026-11-26T00:47:08.831017+00:00');
INSERT INTO "segmentation_results" VALUES('00000005-0000-4000-8000-000000000000','user-1','uploads/user-1/5',NULL,'cat, black dog','[]','{"attempt": "8cf1c984-264c-4397-94a8-53aeab39db93"}','processing','2026-11-26T00:47:08.831404+00:00','2026-11-26T00:47:08.831369+00:00');
INSERT INTO "segmentation_results" VALUES('00000006-0000-4000-8000-000000000000','user-1','uploads/user-1/6',NULL,'cat, black dog','[]','{"attempt": "ba0ddf1d-60fe-494a-89fb-2320eb3870d0"}','processing','2026-11-26T00:47:08.831740+00:00','2026-11-26T00:47:08.831707+00:00');
INSERT INTO "segmentation_results" VALUES('00000007-0000-4000-8000-000000000000','user-1','uploads/user-1/7',NULL,'cat, black dog','[]','{}','pending','2026-11-26T00:47:08.831898+00:00','2026-11-26T00:47:08.831898+00:00');
COMMIT;
