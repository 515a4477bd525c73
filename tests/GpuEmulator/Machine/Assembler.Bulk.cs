using MiniCpmNative.GpuEmulator.Memory;
using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Machine;

internal sealed unsafe partial class Assembler
{
    // [to], [from], bytes with a group, or [to], [from], bytes, [mbarrier] to shared memory.
    private bool BuildBulkCopy(Instruction i, PtxInstruction p, Opcode op, bool add)
    {
        if (op.Has("commit_group"))
        {
            i.Run = &BulkCopies.Commit;
            return true;
        }
        if (op.Has("wait_group"))
        {
            i.Mode = op.Has("read") ? 1 : 0;
            Operands(p, 1);
            i.Count = Number(p.Operands[0]);
            i.Run = &BulkCopies.WaitFor;
            return true;
        }
        if (op.Has("tensor")) return BuildTensorCopy(i, p, op, add);
        bool toShared = op.Has("mbarrier::complete_tx::bytes");
        if (op.Any("shared::cta", "shared::cluster").Length == 0 || !op.Has("global")
            || toShared == op.Has("bulk_group"))
            throw new PtxException("bulk copies go from .global to shared memory with " +
                ".mbarrier::complete_tx::bytes, or back with .bulk_group");
        if (add && (toShared || !op.Has("add") || !op.Has("f32")))
            throw new PtxException("of bulk reductions only .add.f32 to .global is known");
        int hint = op.Has("L2::cache_hint") ? 1 : 0;
        Operands(p, (toShared ? 4 : 3) + hint);
        i.B = Row(p.Operands[2], 4);
        TakeAddress(i, p.Operands[toShared ? 0 : 1], Space.Shared);
        (i.D, i.DWidth, i.Mode2) = (i.A, i.AddressIs64 ? 8 : 4, checked((int)i.Offset));
        if (toShared) TakeBarrier(i, p.Operands[3]);
        TakeAddress(i, p.Operands[toShared ? 1 : 0], Space.Global);
        i.Mode = toShared ? 2 : add ? 1 : 0;
        i.Run = &BulkCopies.Issue;
        return true;
    }

    // [to], [map, {coordinates}], [mbarrier], or [map, {coordinates}], [from] with a group.
    private bool BuildTensorCopy(Instruction i, PtxInstruction p, Opcode op, bool add)
    {
        bool toShared = op.Has("mbarrier::complete_tx::bytes");
        string dimensions = op.Any("1d", "2d", "3d", "4d", "5d");
        op.Has("tile");
        if (op.Any("shared::cta", "shared::cluster").Length == 0 || !op.Has("global") || add
            || dimensions.Length == 0 || toShared == op.Has("bulk_group"))
            throw new PtxException("copies of tensors are tiled, of .1d to .5d, from .global to " +
                "shared memory with .mbarrier::complete_tx::bytes, or back with .bulk_group");
        int hint = op.Has("L2::cache_hint") ? 1 : 0, map = toShared ? 1 : 0;
        Operands(p, (toShared ? 3 : 2) + hint);
        TakeAddress(i, p.Operands[1 - map], Space.Shared);
        (i.D, i.DWidth, i.Mode2) = (i.A, i.AddressIs64 ? 8 : 4, checked((int)i.Offset));
        if (toShared) TakeBarrier(i, p.Operands[2]);
        TakeAddress(i, p.Operands[map], Space.Generic);
        i.Rows = [.. p.Operands[map].Elements.Select(o => Row(o, 4))];
        if (i.Rows.Length != dimensions[0] - '0')
            throw new PtxException($".{dimensions} needs as many coordinates");
        i.Mode = toShared ? 2 : 0;
        i.Run = &TensorCopies.Issue;
        return true;
    }

    private void TakeBarrier(Instruction i, PtxOperand o)
    {
        TakeAddress(i, o, Space.Shared);
        (i.C, i.Barrier64, i.BarrierOffset) = i.A >= 0
            ? (i.A, i.AddressIs64, i.Offset)
            : (Constant(0, 4), false, i.Offset);
    }
}
