// SPDX-License-Identifier: GPL-2.0-only

#include <linux/blk-mq.h>
#include <linux/blkdev.h>

bool rust_helper_blk_mq_add_to_batch(struct request *req,
				     struct io_comp_batch *iob, bool is_error,
				     void (*complete)(struct io_comp_batch *))
{
	return blk_mq_add_to_batch(req, iob, is_error, complete);
}

/* As queue_limits_start_update(), if nobody else is changing them. */
bool rust_helper_queue_limits_try_start_update(struct request_queue *q,
					       struct queue_limits *lim)
{
	if (!mutex_trylock(&q->limits_lock))
		return false;
	*lim = q->limits;
	return true;
}

void rust_helper_queue_limits_cancel_update(struct request_queue *q)
{
	queue_limits_cancel_update(q);
}

unsigned int rust_helper_disk_openers(struct gendisk *disk)
{
	return disk_openers(disk);
}

/*
 * Whether the disk or a partition is claimed by a holder that cannot be told
 * of its removal. Claims of partitions count for the whole disk too.
 */
bool rust_helper_disk_has_unaware_holder(struct gendisk *disk)
{
	int whole = READ_ONCE(disk->part0->bd_holders);
	struct block_device *part;
	bool unaware = false;
	unsigned long idx;

	rcu_read_lock();
	xa_for_each_start(&disk->part_tbl, idx, part, 1) {
		int holders = READ_ONCE(part->bd_holders);

		whole -= holders;
		unaware |= holders && !READ_ONCE(part->bd_holder_ops);
	}
	rcu_read_unlock();
	return unaware || (whole > 0 && !READ_ONCE(disk->part0->bd_holder_ops));
}
