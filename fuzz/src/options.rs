//! Options by key and value: a refusal names what it refuses, and what is accepted can be used.

use std::sync::Arc;

use qcow2::error::Error;
use qcow2::image::create_with;
use qcow2::image::options::{OPTIONS, parse_size};
use qcow2::storage::Blocking;
use qcow2::wait::block_on;
use qcow2::{CreateOptions, Image, OpenOptions};

use crate::bytes::Bytes;
use crate::disk::Disk;
use crate::heap::limited;
use crate::open_read::HEAP_MAX;
use crate::rule;

/// Most memory that a cache is let to have.
const CACHE_MAX: u64 = 16 << 20;

const VALUES: [&str; 20] = [
    "", "on", "off", "512", "65536", "64k", "2M", "1G", "0.10", "1.1", "zlib", "zstd", "metadata", "full", "raw",
    "qcow2", "relative", "unmap", "16384", "-1",
];

/// Sets options, creates an image with them, and opens it with others.
pub fn options(input: &[u8]) {
    let mut input = Bytes::new(input);
    limited(HEAP_MAX, || run(&mut input));
}

fn run(input: &mut Bytes<'_>) {
    let (mut create, mut open) = (CreateOptions::default(), OpenOptions::default());
    for _ in 0..input.u8() % 12 {
        let any_key = input.u8() & 15 == 0;
        let key = match any_key {
            true => String::from_utf8_lossy(input.take(12)).into_owned(),
            false => OPTIONS[input.u8() as usize % OPTIONS.len()].key.to_owned(),
        };
        let value = match input.u8() {
            n if n & 1 == 0 => VALUES[n as usize / 2 % VALUES.len()].to_owned(),
            n => String::from_utf8_lossy(input.take(n as usize / 2)).into_owned(),
        };
        let _ = parse_size(&value);
        for refused in [create.set(&key, &value).err(), open.set(&key, &value).err()].into_iter().flatten() {
            let text = refused.to_string();
            rule!(text.contains(&key) || key.is_empty() || !key.is_ascii(), "{key}={value}: {text}");
        }
    }
    let size = match input.u8() {
        n if n & 1 == 0 => u64::from(input.u32()) << 9 >> (n >> 1 & 15),
        _ => input.u64(),
    };
    // Only what fits: others are refused by the storage.
    let disk = Arc::new(Disk::new(Vec::new()));
    let made = block_on(create_with(&Blocking, &*disk, size, &create));
    if made.is_err() {
        return;
    }
    open.backing = Default::default(); // no names of this machine
    open.data_file = None;
    // What a caller asks for is his to have; what counts here is what is held beside that.
    open.l2_cache_size = open.l2_cache_size.min(CACHE_MAX);
    open.refcount_cache_size = open.refcount_cache_size.min(CACHE_MAX);
    open.compressed_cache_size = open.compressed_cache_size.min(CACHE_MAX);
    let opened = Image::open_storage(disk.clone(), &open);
    match opened {
        Ok(image) => {
            let size = size.next_multiple_of(512);
            rule!(image.size() == size, "created with {size} bytes, and has {}", image.size());
            if size > 0 && !open.inspect {
                let mut byte = [1];
                image.pread(&mut byte, size - 1).unwrap_or_else(|e| panic!("a new image does not read: {e}"));
                rule!(byte == [0], "a new image is not empty");
            }
            image.close().unwrap_or_else(|e| panic!("a new image does not close: {e}"));
        }
        Err(e) => {
            let is_expected = matches!(
                e,
                Error::BackingDenied { .. }
                    | Error::Backing { .. }
                    | Error::SnapshotMissing { .. }
                    | Error::OptionValue { .. }
                    | Error::DataFileMissing
                    | Error::DataFileDenied { .. }
                    | Error::ChainTooDeep { .. }
            ) || open.cache.direct;
            rule!(is_expected, "created, but not to be opened: {e:?}");
        }
    }
}
