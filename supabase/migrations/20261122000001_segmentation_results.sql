-- The table of segmentation tasks: the Edge inserts a row, this server updates it, its user subscribes to it.
-- May be applied to an empty Supabase project, and again to one that has these tables.

-- The parent tables belong to the application; minimal ones are created only where they are missing.
do $$
begin
    if to_regclass('public.users_profile') is null then
        create table public.users_profile (
            id uuid primary key references auth.users (id) on delete cascade,
            created_at timestamptz not null default now()
        );
        alter table public.users_profile enable row level security;
        create policy "own profile" on public.users_profile
            for select to authenticated using ((select auth.uid()) = id);
        grant select on public.users_profile to authenticated;
        grant select, insert, update, delete on public.users_profile to service_role;
    end if;

    if to_regclass('public.projects') is null then
        create table public.projects (
            id uuid primary key default gen_random_uuid(),
            user_id uuid not null references public.users_profile (id) on delete cascade,
            name text not null default '',
            created_at timestamptz not null default now()
        );
        create index projects_user_id on public.projects (user_id);
        alter table public.projects enable row level security;
        create policy "own projects" on public.projects
            for all to authenticated
            using ((select auth.uid()) = user_id) with check ((select auth.uid()) = user_id);
        grant select, insert, update, delete on public.projects to authenticated, service_role;
    end if;
end
$$;

create table if not exists public.segmentation_results (
    id uuid primary key default gen_random_uuid(),
    project_id uuid references public.projects (id) on delete set null,
    user_id uuid not null references public.users_profile (id) on delete cascade,
    source_image_url text not null,
    mask_image_url text,
    text_prompt text not null,
    labels jsonb not null default '[]',
    metadata jsonb not null default '{}',
    status text not null default 'pending'
        constraint segmentation_results_status_check
        check (status in ('pending', 'processing', 'done', 'error')),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

create index if not exists segmentation_results_user_id on public.segmentation_results (user_id);
create index if not exists segmentation_results_project_id on public.segmentation_results (project_id);
create index if not exists segmentation_results_status on public.segmentation_results (status);
create index if not exists segmentation_results_created_at
    on public.segmentation_results (created_at desc);
-- For the search of tasks whose lease may have expired.
create index if not exists segmentation_results_processing
    on public.segmentation_results (updated_at) where status = 'processing';

-- Without the columns of leases, a lease starts at updated_at: only the database's clock sets it.
create or replace function public.segmentation_results_set_updated_at() returns trigger
language plpgsql
set search_path = ''
as $$
begin
    new.updated_at = now();
    return new;
end
$$;

create or replace trigger segmentation_results_set_updated_at
    before update on public.segmentation_results
    for each row execute function public.segmentation_results_set_updated_at();

alter table public.segmentation_results enable row level security;

-- (select ...) evaluates auth.uid() once per statement, not once per row.
drop policy if exists "select own results" on public.segmentation_results;
create policy "select own results" on public.segmentation_results
    for select to authenticated using ((select auth.uid()) = user_id);

drop policy if exists "insert own results" on public.segmentation_results;
create policy "insert own results" on public.segmentation_results
    for insert to authenticated with check ((select auth.uid()) = user_id);

drop policy if exists "update own results" on public.segmentation_results;
create policy "update own results" on public.segmentation_results
    for update to authenticated
    using ((select auth.uid()) = user_id) with check ((select auth.uid()) = user_id);

drop policy if exists "delete own results" on public.segmentation_results;
create policy "delete own results" on public.segmentation_results
    for delete to authenticated using ((select auth.uid()) = user_id);

-- Supabase Realtime publishes each update to the user's subscriptions.
do $$
begin
    if exists (select from pg_publication where pubname = 'supabase_realtime')
        and not exists (
            select from pg_publication_tables
            where pubname = 'supabase_realtime' and schemaname = 'public'
                and tablename = 'segmentation_results'
        )
    then
        alter publication supabase_realtime add table public.segmentation_results;
    end if;
end
$$;
