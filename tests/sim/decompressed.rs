//! Reading compressed clusters: what is fetched how often, which of several bad ones is told, and that nothing that was
//! kept decompressed is older than the entry it is read by.

use std::io;
use std::sync::{Arc, Mutex};

use crate::judge::Layout;
use crate::pass_on::pass_on;
use crate::stage::squeezable;
use qcow2::format::GuestOffset;
use qcow2::image::{CreateOptions, Image, OpenOptions, WriteFlags, ZeroFlags};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::DiskImage;
use qcow2::storage::{Blocking, IoDst, IoSrc, Storage};

const CLUSTER: u64 = 64 << 10;
const COMPRESSED: WriteFlags = WriteFlags { fua: false, compressed: true };

fn write_compressed(image: &Image, data: &[u8], offset: u64) {
    image.write(&[IoSrc::from(data)], GuestOffset(offset), COMPRESSED).unwrap();
}

/// A memory image and its storage.
pub fn memory(settings: &[(&str, &str)], size: u64) -> (Arc<MemoryStorage>, Image) {
    let storage = Arc::new(MemoryStorage::default());
    let mut options = CreateOptions::default();
    settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
    qcow2::wait::block_on(qcow2::image::create_with(&Blocking, &*storage, size, &options)).unwrap();
    let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    (storage, image)
}

/// A storage that counts what is read from it.
pub struct Counting {
    pub below: Arc<MemoryStorage>,
    pub reads: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl Storage for Counting {
    pass_on!(below: write flush size truncate);
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        self.reads.lock().unwrap().push((offset, pieces.iter().map(|piece| piece.len() as u64).sum()));
        self.below.read(pieces, offset)
    }
}

/// An image of so many clusters, all of them compressed, and what it holds.
fn compressed_image(method: &str, clusters: u64) -> (Arc<MemoryStorage>, Vec<u8>) {
    let (storage, image) = memory(&[("compression_type", method)], clusters * CLUSTER);
    let content: Vec<u8> = (0..clusters).flat_map(|n| squeezable(n + 1, n * CLUSTER, CLUSTER)).collect();
    write_compressed(&image, &content, 0);
    image.close().unwrap();
    (storage, content)
}

/// What of a compressed image is read from its file: small reads fetch (and decompress) each cluster once, large ones
/// fetch neighbours together.
#[test]
fn clusters_are_fetched_once_and_together() {
    for method in ["zlib", "zstd"] {
        let (storage, content) = compressed_image(method, 32);
        let reads = Arc::new(Mutex::new(Vec::new()));
        for (cache, buffer, fetched_max) in
            [("4M", 4096u64, 32), ("64k", 4096, 512), ("0", 4096, 512), ("0", 32 * CLUSTER, 1), ("128k", 3000, 32)]
        {
            let below: Arc<dyn Storage> = Arc::new(Counting { below: storage.clone(), reads: reads.clone() });
            let mut options = OpenOptions { read_only: true, ..OpenOptions::default() };
            options.set("compressed_cache_size", cache).unwrap();
            let image = Image::open_storage(below, &options).unwrap();
            image.pread(&mut [0; 1], 31 * CLUSTER).unwrap(); // so that the L2 table has been read
            reads.lock().unwrap().clear();
            let mut found = vec![0xaa; content.len()];
            for (n, part) in found.chunks_mut(buffer as usize).enumerate() {
                image.pread(part, n as u64 * buffer).unwrap();
            }
            assert!(found == content, "{method}, {cache}");
            let fetched = reads.lock().unwrap().len();
            let at_least = if cache == "0" && buffer < CLUSTER { 512 } else { 1 };
            let what = format!("{method}, {cache}, {buffer} bytes at a time: {fetched} transfers");
            assert!(fetched <= fetched_max && fetched >= at_least, "{what}");
        }
    }
}

/// A read of many clusters of which some are bad fails for the first of these, wherever they are decompressed; what lies
/// beside them can be read, and a bad one is bad again when it is asked for again.
#[test]
fn of_several_bad_clusters_the_first_one_is_told() {
    for method in ["zlib", "zstd"] {
        let (storage, content) = compressed_image(method, 64);
        let stored = DiskImage::new(storage.snapshot());
        let layout = Layout::parse(&stored).unwrap();
        for bad in [9, 30, 31, 50] {
            let (offset, _) = layout.compressed_extent(layout.entry(0, bad).descriptor);
            storage.write(&[IoSrc::from(&[0xff; 40][..])], offset).unwrap();
        }
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let image = Image::open_storage(storage, &options).unwrap();
        let bad_at = |from: u64, length: u64| {
            let mut found = vec![0xaa; length as usize];
            match image.pread(&mut found, from) {
                Ok(()) => {
                    assert!(found == content[from as usize..(from + length) as usize], "{method}, from {from}");
                    None
                }
                Err(qcow2::Error::Corrupt(corruption)) => corruption.guest_offset.map(|at| at / CLUSTER),
                Err(e) => panic!("{method}: {e}"),
            }
        };
        for _ in 0..3 {
            assert_eq!(bad_at(0, 64 * CLUSTER), Some(9), "{method}");
            assert_eq!(bad_at(10 * CLUSTER, 54 * CLUSTER), Some(30), "{method}");
            assert_eq!(bad_at(10 * CLUSTER, 20 * CLUSTER), None, "{method}");
            assert_eq!(bad_at(31 * CLUSTER + 7, 100), Some(31), "{method}");
            assert_eq!(bad_at(32 * CLUSTER + 7, 100), None, "{method}");
            assert_eq!(bad_at(50 * CLUSTER - 100, 200), Some(50), "{method}");
        }
    }
}

/// A cluster that is kept decompressed, and whose place in the file becomes another's: discarded, written as data,
/// compressed to something else, with a snapshot that still has it or without. What is read is what was written.
#[test]
fn a_kept_cluster_is_forgotten_when_its_place_is_taken() {
    const CLUSTER: u64 = 4096;
    let (storage, image) = memory(&[("cluster_size", "4k")], 64 * CLUSTER);
    let read = |cluster: u64| {
        let mut found = [0; 100];
        image.pread(&mut found, cluster * CLUSTER + 50).unwrap();
        found
    };
    let place = |cluster| Layout::parse(&DiskImage::new(storage.snapshot())).unwrap().entry(0, cluster).descriptor;
    let (mut taken_over, mut last) = (0, 0);
    for round in 0..40u64 {
        let (cluster, data) = (round % 60, squeezable(7 * (round % 30) + 1, (round % 60) * CLUSTER, CLUSTER));
        write_compressed(&image, &data, cluster * CLUSTER);
        image.flush().unwrap();
        assert_eq!(read(cluster), data[50..150], "round {round}");
        assert_eq!(read(cluster), data[50..150], "round {round}, again");
        taken_over += u64::from(place(cluster) == last);
        last = place(cluster);
        match round % 4 {
            0 => image.discard(cluster * CLUSTER, CLUSTER).unwrap(),
            1 => image.pwrite(&vec![9; CLUSTER as usize], cluster * CLUSTER).unwrap(),
            2 => image.write_zeroes(cluster * CLUSTER, CLUSTER, ZeroFlags::default()).unwrap(),
            _ => {
                image.snapshot_create("kept", &Default::default()).unwrap();
                image.discard(cluster * CLUSTER, CLUSTER).unwrap();
                let snapshot = image.snapshot_open("kept").unwrap();
                let mut found = [0; 100];
                snapshot.pread(&mut found, cluster * CLUSTER + 50).unwrap();
                assert_eq!(found, data[50..150], "round {round}, the snapshot");
                drop(snapshot);
                image.snapshot_delete("kept", None).unwrap();
            }
        }
        image.flush().unwrap();
        assert_eq!(read(cluster), if round % 4 == 1 { [9; 100] } else { [0; 100] }, "round {round}, replaced");
    }
    assert!(taken_over > 10, "the place was taken over {taken_over} times only");
    image.close().unwrap();
}
