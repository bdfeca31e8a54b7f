// SPDX-License-Identifier: GPL-2.0-only

#include <linux/blkdev.h>
#include <linux/cdrom.h>
#include <linux/pagemap.h>
#include <linux/xarray.h>

sector_t rust_helper_bdev_nr_sectors(struct block_device *bdev)
{
	return bdev_nr_sectors(bdev);
}

unsigned int rust_helper_bdev_logical_block_size(struct block_device *bdev)
{
	return bdev_logical_block_size(bdev);
}

unsigned int rust_helper_bdev_physical_block_size(struct block_device *bdev)
{
	return bdev_physical_block_size(bdev);
}

bool rust_helper_bdev_write_cache(struct block_device *bdev)
{
	return bdev_write_cache(bdev);
}

bool rust_helper_bdev_read_only(struct block_device *bdev)
{
	return bdev_read_only(bdev);
}

unsigned int rust_helper_bdev_max_discard_sectors(struct block_device *bdev)
{
	return bdev_max_discard_sectors(bdev);
}

unsigned int rust_helper_bdev_max_secure_erase_sectors(struct block_device *bdev)
{
	return bdev_max_secure_erase_sectors(bdev);
}

unsigned int rust_helper_bdev_discard_granularity(struct block_device *bdev)
{
	return bdev_discard_granularity(bdev);
}

bool rust_helper_bdev_is_cdrom(struct block_device *bdev)
{
	return disk_to_cdi(bdev->bd_disk);
}

u64 rust_helper_bdev_diskseq(struct block_device *bdev)
{
	return bdev->bd_disk->diskseq;
}

/*
 * The number of the next partition after *partno that has something in its page
 * cache, or 0. Partitions of the whole disk only.
 */
dev_t rust_helper_bdev_next_cached_partition(struct block_device *bdev,
					     unsigned long *partno)
{
	struct block_device *part;
	dev_t number = 0;

	if (bdev_is_partition(bdev))
		return 0;
	rcu_read_lock();
	do {
		part = xa_find_after(&bdev->bd_disk->part_tbl, partno, ULONG_MAX,
				     XA_PRESENT);
	} while (part && !READ_ONCE(part->bd_mapping->nrpages));
	if (part)
		number = part->bd_dev;
	rcu_read_unlock();
	return number;
}

/* The whole disk that a partition is of, or NULL. */
struct block_device *rust_helper_bdev_disk_of_partition(struct block_device *bdev)
{
	return bdev_is_partition(bdev) ? bdev_whole(bdev) : NULL;
}

bool rust_helper_bdev_is_removable(struct block_device *bdev)
{
	return bdev->bd_disk->flags & GENHD_FL_REMOVABLE;
}

sector_t rust_helper_get_capacity(struct gendisk *disk)
{
	return get_capacity(disk);
}
