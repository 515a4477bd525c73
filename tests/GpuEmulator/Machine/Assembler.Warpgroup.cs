using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Memory;
using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Machine;

// What sm_90 added: products of warpgroups, memory barriers, proxy fences, register counts.
internal sealed unsafe partial class Assembler
{
    private bool BuildWarpgroup(Instruction i, PtxInstruction p, Opcode op)
    {
        string what = op.Any("fence", "commit_group", "wait_group", "mma_async");
        if (!op.Has("sync") || !op.Has("aligned"))
            throw new PtxException("wgmma is .sync.aligned");
        if (what == "mma_async") return BuildWarpgroupMma(i, p, op);
        // The whole warp takes part.
        i.Flow = Flow.Sync;
        Operands(p, what == "wait_group" ? 1 : 0);
        if (what == "wait_group") i.Mode = Number(p.Operands[0]);
        i.Run = what switch
        {
            "fence" => &Warpgroup.Fence,
            "commit_group" => &Warpgroup.Commit,
            "wait_group" => &Warpgroup.WaitFor,
            _ => throw new PtxException("wgmma.fence, commit_group, wait_group, mma_async are known"),
        };
        return true;
    }

    // {d}, a-desc, b-desc, scale-d, imm-scale-a, imm-scale-b, imm-trans-a, imm-trans-b, or
    // {d}, {a}, b-desc, scale-d, imm-scale-a, imm-scale-b, imm-trans-b.
    private bool BuildWarpgroupMma(Instruction i, PtxInstruction p, Opcode op)
    {
        string b = op.Last(), a = op.Last(), d = op.Last(), shape = op.Last();
        if (d != "f32" || a != "bf16" || b != "bf16")
            throw new PtxException($"wgmma of {d}.{a}.{b} is not known");
        if (!shape.StartsWith("m64n", StringComparison.Ordinal)
            || !shape.EndsWith("k16", StringComparison.Ordinal)
            || !int.TryParse(shape.AsSpan(4, shape.Length - 7), out int columns)
            || columns % 8 != 0 || columns is < 8 or > 256)
            throw new PtxException($"shape .{shape} is not m64nNk16, N a multiple of 8 to 256");
        bool registers = p.Operands.Length > 1 && p.Operands[1].Kind == OperandKind.Vector;
        Operands(p, registers ? 7 : 8);
        int[] rows = Vector(p.Operands[0], 4);
        if (rows.Length != columns / 2 || rows.Contains(-1))
            throw new PtxException($"D has {columns / 2} registers, got {rows.Length}");
        i.Flow = Flow.Group;
        i.Count = columns;
        if (registers)
        {
            int[] fragment = Vector(p.Operands[1], 4);
            if (fragment.Length != 4) throw new PtxException("A has 4 registers");
            rows = [.. rows, .. fragment];
        }
        else i.A = Row(p.Operands[1], 8);
        i.Rows = rows;
        i.B = Row(p.Operands[2], 8);
        i.C = Predicate(p.Operands[3], out i.FlipC);
        bool minus = Sign(p.Operands[4]) != Sign(p.Operands[5]);
        int transA = registers ? 0 : Number(p.Operands[6]), transB = Number(p.Operands[^1]);
        if (transA > 1 || transB > 1) throw new PtxException("imm-trans is 0 or 1");
        i.Mode = transA | transB << 1 | (minus ? 4 : 0);
        i.Flops = 2 * 16 * columns * 16;
        i.TensorFlops = true;
        i.Run = &Warpgroup.Multiply;
        return true;
    }

    private static bool Sign(PtxOperand o) => Number(o) == 1
        ? o.Negated
        : throw new PtxException("imm-scale is 1 or -1");

    private bool BuildMemoryBarrier(Instruction i, PtxInstruction p, Opcode op)
    {
        string what = op.Any("init", "inval", "arrive", "arrive_drop", "test_wait", "try_wait",
            "expect_tx", "complete_tx");
        bool expecting = what is "arrive" or "arrive_drop" && op.Has("expect_tx"),
            parity = op.Has("parity"), incomplete = op.Has("noComplete");
        op.Any("acquire", "release", "relaxed");
        op.Any("cta", "cluster");
        if (TakeSpace(op) is not (Space.Shared or Space.Generic))
            throw new PtxException("an mbarrier is in shared memory");
        if (!op.Has("b64")) throw new PtxException("an mbarrier is .b64");
        bool hasResult = what is "arrive" or "arrive_drop" or "test_wait" or "try_wait"
            && p.Operands[0].Kind != OperandKind.Address;
        int at = hasResult ? 1 : 0, last = p.Operands.Length - 1;
        TakeAddress(i, p.Operands[at], Space.Shared);
        switch (what)
        {
            case "init":
                Operands(p, 2);
                i.B = Row(p.Operands[1], 4);
                i.Run = &MemoryBarriers.Initialise;
                return true;
            case "inval":
                Operands(p, 1);
                i.Run = &MemoryBarriers.Invalidate;
                return true;
            case "arrive" or "arrive_drop":
                Operands(p, at + (expecting ? 2 : 1), at + 2);
                if (hasResult) i.D = Result(p.Operands[0], 8);
                if (last > at) i.B = Row(p.Operands[last], 4);
                i.Mode = expecting ? MemoryBarriers.Expecting : 0;
                i.Mode2 = what == "arrive_drop" ? 2 : incomplete ? 1 : 0;
                i.Run = &MemoryBarriers.Arrive;
                return true;
            case "expect_tx" or "complete_tx":
                Operands(p, 2);
                i.B = Row(p.Operands[1], 4);
                i.Mode = what == "expect_tx" ? 1 : -1;
                i.Run = &MemoryBarriers.Bytes;
                return true;
            case "test_wait" or "try_wait":
                // The last operand of try_wait is a hint how long to sleep.
                Operands(p, 3, what == "try_wait" ? 4 : 3);
                i.D = Predicate(p.Operands[0], out _);
                i.B = Row(p.Operands[2], parity ? 4 : 8);
                i.Mode = parity ? 1 : 0;
                i.Flow = Flow.Poll;
                i.Run = &MemoryBarriers.Wait;
                return true;
            default: throw new PtxException("this operation on an mbarrier is not known");
        }
    }

    private static bool BuildFence(Instruction i, Opcode op)
    {
        if (op.Has("proxy"))
        {
            if (op.Has("tensormap::generic") || !op.Has("async"))
                throw new PtxException("only fence.proxy.async is known");
            op.Any("global", "shared::cta", "shared::cluster");
            i.Run = &Warpgroup.ProxyFence;
            return true;
        }
        op.Any("acq_rel", "sc", "acquire", "release");
        op.Has("mbarrier_init");
        i.Run = op.Any("gpu", "cta", "sys", "cluster") is "gpu" or "sys" ? &Moves.Fence
            : &Moves.Nothing;
        return true;
    }

    private bool BuildRegisterCount(Instruction i, PtxInstruction p, Opcode op)
    {
        i.Mode2 = op.Any("inc", "dec") switch { "inc" => 1, "dec" => -1, _ => 0 };
        if (i.Mode2 == 0 || !op.Has("sync") || !op.Has("aligned") || !op.Has("u32"))
            throw new PtxException("setmaxnreg.inc or .dec.sync.aligned.u32 is known");
        Operands(p, 1);
        i.Mode = Number(p.Operands[0]);
        if (i.Mode % 8 != 0 || i.Mode is < 24 or > 256)
            throw new PtxException($"{i.Mode} registers: multiples of 8 from 24 to 256");
        (i.Flow, i.Holds) = (Flow.Poll, true);
        i.Run = &Warpgroup.SetRegisters;
        return true;
    }
}
