//! What the simulated tests share: images to start from, and the oracle of what a guest may read.
#![allow(dead_code, unused_imports)] // each test file uses its own part

mod guest;
mod images;
mod world;

pub use guest::{Guest, PAST_THE_END, Ticket, content_of, pattern, squeezable};
pub use images::{Case, DataFile, Start, cases, data_file_cases, write_sparse};
pub use world::{Operation, Tracked, World};

use std::sync::Arc;

use qcow2::image::options::DetectZeroes;
use qcow2::image::{Image, OpenOptions};
use qcow2::storage::sim::{DiskImage, SECTOR_BYTES, SimDisk};
use qcow2::storage::{Blocking, Io, Storage};

use crate::judge::{Judge, Layout};

/// Opens an image on a simulated disk through a driver.
pub async fn open<I: Io>(io: &I, disk: &Arc<SimDisk>, start: &Start, l2_cache_size: u64) -> qcow2::Result<Image> {
    let storage: Arc<dyn Storage> = disk.clone();
    Image::open_with(io, storage, &options(start, l2_cache_size)).await
}

/// The disks that an image starts on: its own, and that of its external data file (empty where there is none).
pub fn disks(start: &Start) -> [Arc<SimDisk>; 2] {
    [&start.image, &start.data].map(|image| Arc::new(SimDisk::new(image.clone())))
}

/// As [`open`], for an image that may have an external data file.
pub async fn open_disks<I: Io>(
    io: &I,
    [image, data]: &[Arc<SimDisk>; 2],
    start: &Start,
    l2_cache_size: u64,
) -> qcow2::Result<Image> {
    let mut options = options(start, l2_cache_size);
    if start.data_file.is_some() {
        options.data_file_storages = vec![Some(data.clone() as Arc<dyn Storage>)];
    }
    Image::open_with(io, image.clone() as Arc<dyn Storage>, &options).await
}

/// Options for opening an image: its backing file is given by the caller.
pub fn options(start: &Start, l2_cache_size: u64) -> OpenOptions {
    let mut options = OpenOptions { detect_zeroes: DetectZeroes::Unmap, ..OpenOptions::default() };
    if let Some(backing) = &start.backing {
        options.backing_storages = vec![backing.clone() as Arc<dyn Storage>];
    }
    if l2_cache_size != 0 {
        options.l2_cache_size = l2_cache_size;
        options.refcount_cache_size = l2_cache_size;
    }
    options
}

/// Judges one disk: structure, then what the guest and each snapshot would read. Returns what is wrong.
pub fn judge_disk(judge: &mut Judge, image: &DiskImage, guest: &Guest, start: &Start) -> Vec<String> {
    judge_sample(judge, image, guest, start, 0, 1)
}

/// As [`judge_disk`], for every `n`th of the sectors that have no unflushed values.
pub fn judge_sample(
    judge: &mut Judge,
    image: &DiskImage,
    guest: &Guest,
    start: &Start,
    phase: u64,
    n: u64,
) -> Vec<String> {
    judge_files(judge, [image, &DiskImage::default()], guest, start, (phase, n))
}

/// D14: what the raw data file holds by itself is what the tables say, in every sector and after every crash.
fn judge_raw(sector: u64, data: &DiskImage, by_the_tables: &[u8; SECTOR_BYTES]) -> Option<String> {
    let mut alone = [0; SECTOR_BYTES];
    data.read(sector * SECTOR_BYTES as u64, &mut alone);
    (alone != *by_the_tables).then(|| {
        let (is, shows) = (content_of(&alone), content_of(by_the_tables));
        format!("D14: sector {sector} of the raw data file is {is}, the tables show {shows}")
    })
}

/// As [`judge_sample`], for an image that may have an external data file; (phase, n) as there.
pub fn judge_files(
    judge: &mut Judge,
    files: [&DiskImage; 2],
    guest: &Guest,
    start: &Start,
    (phase, n): (u64, u64),
) -> Vec<String> {
    let layout = match Layout::parse_files(files) {
        Ok(layout) => layout,
        Err(why) => return vec![format!("D1: {why}")],
    };
    let mut wrong = judge.judge_parsed(&layout).violations;
    let mut found = [0; SECTOR_BYTES];
    let end = layout.trees[0].guest_size / SECTOR_BYTES as u64;
    for sector in guest.sample(phase, n) {
        match layout.read(0, sector, &mut found) {
            _ if sector >= end => found = PAST_THE_END,
            Ok(Some(())) => {}
            Ok(None) => found = start.backing_sector(sector),
            Err(why) => wrong.push(format!("D8: {why}")),
        }
        if let Err(why) = guest.judge(sector, &found) {
            wrong.push(why);
        }
        if start.is_raw() && sector < end {
            wrong.extend(judge_raw(sector, files[1], &found));
        }
    }
    if layout.trees.len() != start.snapshots.len() + 1 {
        wrong.push(format!("D7: {} snapshots instead of {}", layout.trees.len() - 1, start.snapshots.len()));
        return wrong;
    }
    for (tree, expected) in (1..).zip(&start.snapshots) {
        let end = layout.trees[tree].guest_size / SECTOR_BYTES as u64;
        for (&sector, content) in start.hot_sectors.iter().zip(expected).skip((phase % n) as usize).step_by(n as usize)
        {
            match layout.read(tree, sector, &mut found) {
                _ if sector >= end => found = PAST_THE_END,
                Ok(Some(())) => {}
                Ok(None) => found = start.backing_sector(sector),
                Err(why) => wrong.push(format!("D7: snapshot: {why}")),
            }
            if found != **content {
                let is = content_of(&found);
                wrong.push(format!(
                    "D7: snapshot {tree}, guest sector {sector} reads {is}, was {}",
                    content_of(content)
                ));
            }
        }
    }
    wrong
}

/// Opens a crash image with the library, reads it, writes three times, flushes, and judges again: damage that is
/// only latent on the disk (a stale COPIED flag, a free cluster that is in use) bites now.
pub fn reopen_and_write(judge: &mut Judge, image: &DiskImage, guest: &Guest, start: &Start, seed: u64) -> Vec<String> {
    reopen_files(judge, [image, &DiskImage::default()], guest, start, seed)
}

/// As [`reopen_and_write`], for an image that may have an external data file.
pub fn reopen_files(judge: &mut Judge, files: [&DiskImage; 2], guest: &Guest, start: &Start, seed: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    let disks = files.map(|image| Arc::new(SimDisk::new(image.clone())));
    let opened = qcow2::wait::block_on(open_disks(&Blocking, &disks, start, 0));
    let again = match opened {
        Ok(again) => again,
        Err(why) => return vec![format!("reopen: {why}")],
    };
    let mut guest = guest.clone();
    let mut found = [0; SECTOR_BYTES];
    for sector in guest.sectors().collect::<Vec<_>>() {
        if sector * SECTOR_BYTES as u64 >= again.size() {
            found = PAST_THE_END;
        } else if let Err(why) = again.pread(&mut found, sector * SECTOR_BYTES as u64) {
            wrong.push(format!("reopen: guest sector {sector}: {why}"));
            continue;
        }
        if let Err(why) = guest.judge(sector, &found) {
            wrong.push(format!("reopen: {why}"));
        }
        // From now on it is what it was found to be.
        guest.settle(sector, &found);
    }
    let mut rng = qcow2::storage::sim::Rng::new(seed);
    for n in 0..3u64 {
        let (offset, length) = start.random_range(&mut rng, 1);
        let length = length.min(again.size().saturating_sub(offset));
        if length == 0 {
            continue;
        }
        let data = pattern(900_000 + n, offset, length);
        let ticket = guest.issue(offset, &data);
        match again.pwrite(&data, offset) {
            Ok(()) => guest.complete(&ticket),
            Err(why) => wrong.push(format!("reopen: write: {why}")),
        }
    }
    match again.flush() {
        Ok(()) => guest.flushed(guest.now()),
        Err(why) => wrong.push(format!("reopen: flush: {why}")),
    }
    wrong.extend(judge_durable(judge, &disks, &guest, start).into_iter().map(|w| format!("after reopen: {w}")));
    if let Err(why) = again.close() {
        wrong.push(format!("reopen: close: {why}"));
    }
    wrong.extend(judge_durable(judge, &disks, &guest, start).into_iter().map(|w| format!("after close: {w}")));
    wrong
}

/// Judges what is durable for certain.
pub fn judge_durable(judge: &mut Judge, disks: &[Arc<SimDisk>; 2], guest: &Guest, start: &Start) -> Vec<String> {
    let [image, data] = disks.each_ref().map(|disk| disk.durable());
    judge_files(judge, [&image, &data], guest, start, (0, 1))
}
