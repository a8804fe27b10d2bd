//! Check and repair of a damaged image: a check writes nothing, a repair loses nothing that could be read, what it says
//! afterwards is what the next check says, and a second repair has nothing to do.

use std::sync::Arc;

use qcow2::error::Error;
use qcow2::image::check::{CheckOptions, CheckResult, FindingKind, OnFinding, Repair, check_with};
use qcow2::image::{Image, OpenOptions};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{Blocking, Storage};
use qcow2::wait::block_on;

use crate::damage::{Damage, Site};
use crate::fixture::Fixture;
use crate::guarded::Guarded;

macro_rules! rule {
    ($holds:expr, $($broken:tt)+) => {
        if !$holds {
            return Err(format!($($broken)+));
        }
    };
}

fn check(storage: &Arc<Guarded>, repair: Repair) -> Result<CheckResult, Error> {
    check_telling(storage, repair, &mut |_| {})
}

fn check_telling(storage: &Arc<Guarded>, repair: Repair, tell: OnFinding<'_>) -> Result<CheckResult, Error> {
    let mut options = CheckOptions { repair, memory_bytes: 1 << 20, on_finding: Some(tell), ..CheckOptions::default() };
    let storage = Arc::clone(storage) as Arc<dyn Storage>;
    block_on(check_with(&Blocking, storage, "image", &OpenOptions::default(), &mut options))
}

/// What the guest reads, sector by sector; `None` where that is an error.
fn content(fixture: &Fixture, bytes: Vec<u8>) -> Vec<Option<[u8; 512]>> {
    let backing = fixture.raw_backing.iter().map(|b| Arc::new(MemoryStorage::new(b.clone())) as Arc<dyn Storage>);
    let options = OpenOptions { read_only: true, backing_storages: backing.collect(), ..OpenOptions::default() };
    let Ok(image) = Image::open_storage(Arc::new(MemoryStorage::new(bytes)), &options) else { return Vec::new() };
    let sectors = image.size().min(fixture.expected.len() as u64) / 512;
    let mut all = Vec::new();
    for sector in 0..sectors {
        let mut found = [0; 512];
        all.push(image.pread(&mut found, sector * 512).is_ok().then_some(found));
    }
    all
}

/// Checks and repairs one damaged image.
pub fn on_image(fixture: &Fixture, site: &Site, damage: Damage) -> Result<&'static str, String> {
    let damaged = damage.apply(&fixture.bytes, site);
    let storage = Arc::new(Guarded::new(damaged.clone()));
    let mut overlaps = false;
    let first = check_telling(&storage, Repair::Nothing, &mut |f| overlaps |= f.kind == FindingKind::Overlap);
    rule!(storage.changes() == 0, "a check wrote");
    let Ok(first) = first else {
        let repaired = check(&storage, Repair::All);
        rule!(repaired.is_err() && storage.changes() == 0, "not to be checked ({first:?}), but repaired");
        return Ok("not to be checked");
    };
    let repaired = check(&storage, Repair::All);
    let after = storage.bytes();
    if after == damaged {
        return Ok(if first.is_sound() && first.leaks == 0 { "sound" } else { "nothing to be done" });
    }
    let (before, now) = (content(fixture, damaged), content(fixture, after.clone()));
    let lost = before.iter().enumerate().find(|(n, was)| was.is_some() && now.get(*n) != Some(*was));
    rule!(lost.is_none(), "sector {:?} reads something else after a repair: {repaired:?}", lost.map(|(n, _)| n));
    let Ok(repaired) = repaired else { return Ok("not repaired for want of room") };
    let again = check(&storage, Repair::All).map_err(|e| format!("repaired, and then not to be checked: {e}"))?;
    rule!(storage.bytes() == after, "a second repair wrote: {first:?} {repaired:?} {again:?}");
    let left = |result: &CheckResult| (result.corruptions, result.leaks, result.check_errors);
    rule!(left(&again) == left(&repaired), "{repaired:?}, and then {again:?}");
    // An L2 table that lies in a refcount block has other entries after every change of a count (docs/divergences.md).
    rule!(overlaps || repaired.corruptions <= first.corruptions, "more is wrong than before: {first:?} {repaired:?}");
    Ok(if repaired.is_sound() { "repaired" } else { "repaired in part" })
}
