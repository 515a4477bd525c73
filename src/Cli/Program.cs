using MiniCpmNative.Cli;

if (OpenFiles.Refusal() is { } refusal)
{
    Console.Error.WriteLine(refusal);
    return 1;
}

var error = new Screen(Console.Error);
var output = new Screen(Console.Out, error.WriteLine);
return new CommandLine(output, error, new Runners()).Run(args);
