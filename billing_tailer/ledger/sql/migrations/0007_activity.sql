-- A range of time of the activity page must not mean a look at all details. They are made in one transaction with their
-- receipts, in the order of time.
create index llm_charge_details_time on llm_charge_details using brin (created_at)
    with (pages_per_range = 32, autosummarize = on);
