//! Bugs that were found once, each as small as it could be made.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use qcow2::image::{CreateOptions, Image, OpenOptions};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{Blocking, Storage};

/// The search for a free cluster began anew each time it had to wait for a refcount block. With more full blocks
/// than the cache holds, it evicted the first ones to load the next and never came to an end.
#[test]
fn a_refcount_cache_smaller_than_the_full_blocks_does_not_stop_the_allocator() {
    let (done, finished) = mpsc::channel();
    std::thread::spawn(move || {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        let mut options = CreateOptions::default();
        options.set("cluster_size", "512").unwrap();
        options.set("refcount_bits", "64").unwrap();
        let size = 1 << 20;
        qcow2::wait::block_on(qcow2::image::create_with(&Blocking, &*storage, size, &options)).unwrap();
        let image = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
        // A refcount block counts 64 clusters: this fills more than eight.
        image.pwrite(&vec![1; 300 << 10], 0).unwrap();
        image.close().unwrap();
        let small = OpenOptions { refcount_cache_size: 512, ..OpenOptions::default() };
        let image = Image::open_storage(storage, &small).unwrap();
        image.pwrite(&[2; 512], 400 << 10).unwrap();
        image.pwrite(&[3; 5000], 500 << 10).unwrap();
        image.close().unwrap();
        done.send(()).unwrap();
    });
    finished.recv_timeout(Duration::from_secs(20)).expect("the allocator found a free cluster");
}
