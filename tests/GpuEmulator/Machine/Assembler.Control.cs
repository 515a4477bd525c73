using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Memory;
using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Machine;

internal sealed unsafe partial class Assembler
{
    // Branches, barriers, fences, traps.
    private bool BuildControl(Instruction i, PtxInstruction p, Opcode op)
    {
        switch (op.Stem)
        {
            case "bra":
                op.Has("uni");
                Operands(p, 1);
                i.Flow = Flow.Branch;
                i.Target = _kernel.Labels.TryGetValue(p.Operands[0].Text, out int target)
                    ? target
                    : throw new PtxException($"label {p.Operands[0].Text} does not exist");
                return true;
            case "ret" or "exit":
                op.Has("uni");
                i.Flow = Flow.Exit;
                return true;
            case "trap":
                i.Run = &Moves.Trap;
                return true;
            case "membar":
                string level = op.Any("gl", "cta", "sys");
                if (level.Length == 0) throw new PtxException("the fence's level is missing");
                i.Run = level == "cta" ? &Moves.Nothing : &Moves.Fence;
                return true;
            case "fence": return BuildFence(i, op);
            case "griddepcontrol":
                // The grid before has ended: a stream's work runs in order here.
                if (op.Any("launch_dependents", "wait").Length == 0)
                    throw new PtxException("griddepcontrol.launch_dependents or .wait are known");
                i.Run = &Moves.Nothing;
                return true;
            case "wgmma": return BuildWarpgroup(i, p, op);
            case "mbarrier": return BuildMemoryBarrier(i, p, op);
            case "setmaxnreg": return BuildRegisterCount(i, p, op);
            case "elect":
                Sync(i, op);
                Operands(p, 2);
                TakePair(i, p.Operands[0], 4);
                i.E = Row(p.Operands[1], 4);
                i.Run = &Collectives.Elect;
                return true;
            case "mapa":
                // A cluster is one block: its address is the same everywhere.
                op.Any("shared::cluster");
                string width = op.Last();
                Operands(p, 3);
                i.D = Result(p.Operands[0], Width(width));
                i.A = Row(p.Operands[1], Width(width));
                i.Run = width == "u64" ? &Maps.Unary<Copy<ulong>, ulong>
                    : &Maps.Unary<Copy<uint>, uint>;
                return true;
            case "nanosleep":
                op.Has("u32");
                i.Run = &Moves.Nothing;
                return true;
            case "bar" or "barrier": return BuildBarrier(i, p, op);
            case "activemask":
                op.Has("b32");
                i.D = Result(p.Operands[0], 4);
                i.Run = &Moves.ActiveMask;
                return true;
            default: return false;
        }
    }

    private bool BuildBarrier(Instruction i, PtxInstruction p, Opcode op)
    {
        if (op.Has("warp"))
        {
            op.Has("sync");
            Operands(p, 1);
            i.Flow = Flow.Sync;
            i.E = Row(p.Operands[0], 4);
            i.Run = &Collectives.SynchroniseWarp;
            return true;
        }
        op.Has("cta");
        op.Has("aligned");
        string kind = op.Any("sync", "arrive");
        if (kind.Length == 0) throw new PtxException("only bar.sync and bar.arrive are known");
        Operands(p, 1, 2);
        i.Flow = Flow.Barrier;
        i.Mode2 = kind == "arrive" ? 1 : 0;
        i.A = Row(p.Operands[0], 4);
        if (p.Operands.Length > 1) i.B = Row(p.Operands[1], 4);
        i.Run = &Collectives.Barrier;
        return true;
    }

    // Instructions that exchange values among the lanes of a warp, and cp.async.
    private bool BuildCollective(Instruction i, PtxInstruction p, Opcode op)
    {
        switch (op.Stem)
        {
            case "shfl": return BuildShuffle(i, p, op);
            case "vote": return BuildVote(i, p, op);
            case "redux":
                Sync(i, op);
                i.Mode = (int)Enum.Parse<Reduction>(op.Any("add", "min", "max", "and", "or", "xor"),
                    ignoreCase: true);
                string type = op.Last();
                Operands(p, 3);
                i.D = Result(p.Operands[0], 4);
                i.A = Row(p.Operands[1], 4);
                i.E = Row(p.Operands[2], 4);
                i.Run = type == "s32" ? &Collectives.Reduce<int> : &Collectives.Reduce<uint>;
                if (type is not ("s32" or "u32" or "b32")) throw op.Unknown(type);
                return true;
            case "match": return BuildMatch(i, p, op);
            case "ldmatrix": return BuildMatrixMove(i, p, op, load: true);
            case "stmatrix": return BuildMatrixMove(i, p, op, load: false);
            case "mma": return BuildMma(i, p, op);
            case "cp": return BuildAsyncCopy(i, p, op);
            default: return false;
        }
    }

    private static void Sync(Instruction i, Opcode op)
    {
        if (!op.Has("sync")) throw new PtxException("only the .sync form is known");
        i.Flow = Flow.Sync;
    }

    private bool BuildShuffle(Instruction i, PtxInstruction p, Opcode op)
    {
        Sync(i, op);
        i.Mode = (int)(op.Any("up", "down", "bfly", "idx") switch
        {
            "up" => Shuffle.Up,
            "down" => Shuffle.Down,
            "bfly" => Shuffle.Butterfly,
            "idx" => Shuffle.Index,
            _ => throw new PtxException("the shuffle's mode is missing"),
        });
        if (!op.Has("b32")) throw new PtxException("shfl is .b32");
        Operands(p, 5);
        TakePair(i, p.Operands[0], 4);
        i.A = Row(p.Operands[1], 4);
        i.B = Row(p.Operands[2], 4);
        i.C = Row(p.Operands[3], 4);
        i.E = Row(p.Operands[4], 4);
        i.Run = &Collectives.Shuffle;
        return true;
    }

    // d or d|p, where p is a predicate.
    private void TakePair(Instruction i, PtxOperand o, int width)
    {
        if (o.Kind != OperandKind.Pair)
        {
            i.D = Result(o, width);
            return;
        }
        i.D = Result(o.Elements[0], width);
        i.D2 = Predicate(o.Elements[1], out _);
    }

    private bool BuildVote(Instruction i, PtxInstruction p, Opcode op)
    {
        Sync(i, op);
        string mode = op.Any("all", "any", "uni", "ballot");
        i.Mode = (int)(mode switch
        {
            "all" => Vote.All,
            "any" => Vote.Any,
            "uni" => Vote.Uniform,
            "ballot" => Vote.Ballot,
            _ => throw new PtxException("the vote's mode is missing"),
        });
        string type = op.Last();
        if (type != (mode == "ballot" ? "b32" : "pred")) throw op.Unknown(type);
        Operands(p, 3);
        i.D = mode == "ballot" ? Result(p.Operands[0], 4) : Predicate(p.Operands[0], out _);
        i.A = Predicate(p.Operands[1], out i.FlipA);
        i.E = Row(p.Operands[2], 4);
        i.Run = &Collectives.Vote;
        return true;
    }

    private bool BuildMatch(Instruction i, PtxInstruction p, Opcode op)
    {
        string mode = op.Any("any", "all");
        Sync(i, op);
        string type = op.Last();
        Operands(p, 3);
        i.Mode = mode == "all" ? 1 : 0;
        TakePair(i, p.Operands[0], 4);
        i.A = Row(p.Operands[1], Width(type));
        i.E = Row(p.Operands[2], 4);
        i.Run = type switch
        {
            "b32" => &Collectives.Match<uint>,
            "b64" => &Collectives.Match<ulong>,
            _ => throw op.Unknown(type),
        };
        return true;
    }

    private bool BuildMatrixMove(Instruction i, PtxInstruction p, Opcode op, bool load)
    {
        Sync(i, op);
        if (!op.Has("aligned") || !op.Has("m8n8") || !op.Has("b16"))
            throw new PtxException("only .sync.aligned.m8n8...b16 is known");
        if (op.Any("shared", "shared::cta").Length == 0)
            throw new PtxException("matrices are in .shared");
        i.Count = op.Any("x1", "x2", "x4") switch
        {
            "x1" => 1,
            "x2" => 2,
            "x4" => 4,
            _ => throw new PtxException("the number of matrices is missing"),
        };
        i.Mode = op.Has("trans") ? 1 : 0;
        Operands(p, 2);
        i.Rows = Vector(p.Operands[load ? 0 : 1], 4);
        if (i.Rows.Length != i.Count) throw new PtxException($"expected {i.Count} registers");
        TakeAddress(i, p.Operands[load ? 1 : 0], Space.Shared);
        i.Run = load ? &Matrix.Load : &Matrix.Store;
        return true;
    }

    private bool BuildMma(Instruction i, PtxInstruction p, Opcode op)
    {
        Sync(i, op);
        op.Has("aligned");
        string shape = op.Any("m16n8k16", "m16n8k8");
        if (shape.Length == 0 || !op.Has("row") || !op.Has("col"))
            throw new PtxException("only m16n8k16 and m16n8k8, .row.col are known");
        string c = op.Last(), b = op.Last(), a = op.Last(), d = op.Last();
        if (d != "f32" || c != "f32" || a != b || a is not ("bf16" or "f16"))
            throw new PtxException($"mma of {d}.{a}.{b}.{c} is not known");
        i.Mode = shape == "m16n8k16" ? 2 : 1;
        Operands(p, 4);
        int[][] rows = [.. p.Operands.Select(o => Vector(o, 4))];
        if (rows[0].Length != 4 || rows[1].Length != i.Mode * 2 || rows[2].Length != i.Mode
            || rows[3].Length != 4)
            throw new PtxException("a fragment has the wrong number of registers");
        i.Rows = [.. rows.SelectMany(r => r)];
        i.Flops = 2 * 16 * 8 * 8 * i.Mode;
        i.TensorFlops = true;
        i.Run = a == "bf16" ? &Matrix.Multiply<Brain> : &Matrix.Multiply<HalfRow>;
        return true;
    }

    private bool BuildAsyncCopy(Instruction i, PtxInstruction p, Opcode op)
    {
        bool reduce = op.Has("reduce");
        if (!op.Has("async")) throw new PtxException("only cp.async is known");
        if (op.Has("bulk")) return BuildBulkCopy(i, p, op, reduce);
        if (op.Has("commit_group"))
        {
            i.Run = &AsyncCopies.Commit;
            return true;
        }
        if (op.Has("wait_all") || op.Has("wait_group"))
        {
            i.Mode = p.Operands.Length == 0
                ? -1
                : Number(p.Operands[0]);
            i.Run = &AsyncCopies.WaitFor;
            return true;
        }
        if (op.Has("mbarrier"))
        {
            if (!op.Has("arrive") || !op.Has("b64"))
                throw new PtxException("cp.async.mbarrier.arrive.b64 is known");
            i.Mode = op.Has("noinc") ? 1 : 0;
            TakeSpace(op);
            Operands(p, 1);
            TakeAddress(i, p.Operands[0], Space.Shared);
            i.Run = &AsyncCopies.ArriveWhenDone;
            return true;
        }
        bool cg = op.Has("cg");
        if (!cg && !op.Has("ca")) throw new PtxException("the copy's cache level is missing");
        op.DropHints();
        if (op.Any("shared", "shared::cta").Length == 0 || !op.Has("global"))
            throw new PtxException("cp.async copies from .global to .shared");
        Operands(p, 3, 4);
        i.Mode = Number(p.Operands[2]);
        if (i.Mode is not (4 or 8 or 16) || (cg && i.Mode != 16))
            throw new PtxException($"cp.async of {i.Mode} bytes is not known");
        TakeAddress(i, p.Operands[0], Space.Shared);
        (i.D, i.DWidth, i.Mode2) = (i.A, i.AddressIs64 ? 8 : 4, checked((int)i.Offset));
        TakeAddress(i, p.Operands[1], Space.Global);
        if (p.Operands.Length == 4) i.B = Row(p.Operands[3], 4);
        i.Run = &AsyncCopies.Issue;
        return true;
    }
}
